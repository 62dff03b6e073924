"""An export that was killed is taken up where nothing has changed, and only there."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

import vauban
from tests.export.checkpoints import load_plain, save_checkpoint, sharded, unit
from vauban.edits.moments import Energy
from vauban.export import resume_key

_PROMPTS = ["What is two and two?", "Name a colour of the sky today."]


def killed_in_the_second_shard(source: Path, out: Path, plan: str) -> Path:
    """Export `plan`, an expression over model and tokenizer, and die as a SIGKILL would.

    Returns the first shard, which is finished; nothing cleans up behind it.
    """
    code = (
        "import os, sys, vauban, mlx.core as mx\n"
        "from vauban.export import checkpoint\n"
        "model, tokenizer = vauban.load(sys.argv[1])\n"
        f"prompts = {_PROMPTS!r}\n"
        f"plan = {plan}\n"
        "write, calls = checkpoint.write_safetensors, []\n"
        "def dying(path, *rest):\n"
        "    calls.append(path)\n"
        "    if len(calls) == 2:\n"
        "        path.write_bytes(b'half')\n"
        "        os._exit(9)\n"
        "    return write(path, *rest)\n"
        "checkpoint.write_safetensors = dying\n"
        "plan.export(sys.argv[1], sys.argv[2])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 9, done.stderr
    (left,) = out.parent.glob(f".{out.name}.partial-*")
    return left / "model-00001-of-00003.safetensors"


def test_a_killed_export_is_taken_up_where_it_stopped(tmp_path: Path) -> None:
    """The shard that was finished keeps its file; another plan starts afresh."""
    source = save_checkpoint(tmp_path / "source", "llama", bits=4, shards=3)
    for ones in (True, False):
        out = tmp_path / f"out-{ones}"
        first = killed_in_the_second_shard(source, out, "vauban.plan_cut(model, mx.ones(64))")
        stamp = first.stat().st_ino
        model, _ = vauban.load(source)
        direction = mx.ones(64) if ones else unit()
        report = vauban.plan_cut(model, direction).export(source, out)
        assert report.ok and report.untouched_identical is True and report.direction_left <= 1e-3
        kept = (out / first.name).stat().st_ino == stamp
        assert kept is ones
        assert not list(tmp_path.glob(".*")) and not list(out.glob(".*"))


def test_no_shard_of_a_plan_that_protected_something_else_is_kept(tmp_path: Path) -> None:
    """The two plans differ in what they protect alone, of which their settings say nothing."""
    source = sharded(vauban.organism_path("dense"), tmp_path / "source", 3)
    out = tmp_path / "out"
    killed_in_the_second_shard(
        source,
        out,
        "vauban.plan_cut(model, mx.ones(128), preserve=vauban.Preserve("
        "vauban.collect_preservation_keys(model, tokenizer, prompts), rank=1))",
    )
    model, tokenizer = vauban.load(source)
    keys = vauban.collect_preservation_keys(model, tokenizer, _PROMPTS)
    plan = vauban.plan_cut(model, mx.ones(128), preserve=vauban.Preserve(keys, rank=30))
    taken_up = plan.export(source, out)
    assert taken_up.files == plan.export(source, tmp_path / "undisturbed").files


def test_the_key_knows_everything_that_decides_a_weight(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama")
    plan = vauban.plan_cut(load_plain(source), unit())
    size = plan.updates[-1].basis.shape[1]
    energy = Energy(np.ones((2, 96), np.float32), np.ones(96, np.float32), 5)

    def key(**changes: object) -> str:
        last = dataclasses.replace(plan.updates[-1], **changes)
        changed = dataclasses.replace(plan, updates=(*plan.updates[:-1], last))
        return resume_key(changed, source, None)

    keys = [
        key(),
        key(alpha=0.5),
        key(mode="column"),
        key(bias=True),
        key(rows=mx.ones((size, 1))),
        key(offset=mx.ones(size)),
        key(basis=plan.updates[-1].basis * -1),
        key(inputs=(energy,)),
        key(inputs=(dataclasses.replace(energy, rest=2 * energy.rest),)),
        resume_key(plan, source, "float"),
        resume_key(plan, source, None, rounding="fast"),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0] == resume_key(plan, source, None)
