"""An export that was killed is taken up where nothing has changed, and only there."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import vauban
import vauban.export
from tests.export.checkpoints import load_plain, save_checkpoint, sharded, unit
from vauban.export import CalibratedPlan, checkpoint, resume_key, write
from vauban.rounding import Energy

_PROMPTS = ["What is two and two?", "Name a colour of the sky today."]


# How a process comes to its end, without a chance to clean up.
_DEATHS = {
    "second shard": (
        "write, calls = checkpoint.write_safetensors, []\n"
        "def dying(path, *rest):\n"
        "    calls.append(path)\n"
        "    if len(calls) == 2:\n"
        "        path.write_bytes(b'half')\n"
        "        os._exit(9)\n"
        "    return write(path, *rest)\n"
        "checkpoint.write_safetensors = dying\n"
    ),
    # In the middle of the tokenizer, by the system, which lets no file grow further.
    "side files": (
        "copy = checkpoint.copy_side_files\n"
        "def dying(*rest):\n"
        "    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
        "    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "    return copy(*rest)\n"
        "checkpoint.copy_side_files = dying\n"
    ),
    "read-back": "write.verify_export = lambda *rest, **more: os._exit(9)\n",
}


def killed_export(source: Path, out: Path, plan: str, death: str = "second shard") -> Path:
    """Export `plan`, an expression over model and tokenizer, and die as a SIGKILL would.

    Returns the first shard, which is finished; nothing cleans up behind it.
    """
    code = (
        "import os, resource, signal, sys, vauban, vauban.export, mlx.core as mx\n"
        "from vauban.export import checkpoint, write\n"
        "model, tokenizer = vauban.load(sys.argv[1])\n"
        f"prompts = {_PROMPTS!r}\n"
        f"plan = {plan}\n"
        f"{_DEATHS[death]}"
        "plan.export(sys.argv[1], sys.argv[2])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (9, -signal.SIGXFSZ), done.stderr
    (left,) = out.parent.glob(f".{out.name}.partial-*")
    return left / "model-00001-of-00003.safetensors"


def test_a_killed_export_is_taken_up_where_it_stopped(tmp_path: Path) -> None:
    """The shard that was finished keeps its file; another plan starts afresh."""
    source = save_checkpoint(tmp_path / "source", "llama", bits=4, shards=3)
    for ones in (True, False):
        out = tmp_path / f"out-{ones}"
        first = killed_export(source, out, "vauban.plan_cut(model, mx.ones(64))")
        # A second name, so that no other file gets its number when it is removed.
        (tmp_path / f"first-{ones}").hardlink_to(first)
        stamp = first.stat().st_ino
        model, _ = vauban.load(source)
        direction = mx.ones(64) if ones else unit()
        report = vauban.plan_cut(model, direction).export(source, out)
        assert report.ok and report.untouched_identical is True and report.direction_left <= 1e-3
        kept = (out / first.name).stat().st_ino == stamp
        assert kept is ones
        assert not list(tmp_path.glob(".*")) and not list(out.glob(".*"))


@pytest.mark.parametrize("death", ["side files", "read-back"])
def test_killed_with_all_shards_written_none_is_written_again(tmp_path: Path, death: str) -> None:
    source = save_checkpoint(tmp_path / "source", "llama", bits=4, shards=3)
    out = tmp_path / "out"
    first = killed_export(source, out, "vauban.plan_cut(model, mx.ones(64))", death)
    stamps = written_at(first.parent)
    plan = vauban.plan_cut(vauban.load(source)[0], mx.ones(64))
    assert plan.export(source, out).untouched_identical is True
    assert len(stamps) == 3 and written_at(out) == stamps
    plan.export(source, tmp_path / "undisturbed")
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert not list(tmp_path.glob(".*")) and not list(out.glob(".*"))


def written_at(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("model*.safetensors")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize(
    ("where", "name", "kept"),
    [(checkpoint, "write_safetensors", False), (write, "write_edit_record", True),
     (write, "verify_export", True)],
)  # fmt: skip
def test_a_broken_off_write_is_taken_up_in_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: object, name: str, kept: bool
) -> None:
    """`write` has no staging folder: what it leaves is what a kill leaves."""
    source = save_checkpoint(tmp_path / "source", "llama", shards=2)
    model = load_plain(source)
    plan = vauban.plan_cut(model, unit())
    out = tmp_path / "out"
    out.mkdir()

    def dying(path: object, *rest: object, **more: object) -> None:
        if name == "write_safetensors":
            Path(str(path)).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(where, name, dying)
        plan.write(source, out)
    with pytest.raises(vauban.InputError, match="holds a model already"):
        vauban.plan_cut(model, mx.ones(64)).write(source, out)
    stamps = written_at(out)
    assert plan.write(source, out).untouched_identical is True
    assert not list(out.glob(".*"))
    assert (written_at(out) == stamps) is kept
    # A finished folder is another model's.
    with pytest.raises(vauban.InputError, match="holds a model already"):
        plan.write(source, out)


def test_no_shard_of_a_plan_that_protected_something_else_is_kept(tmp_path: Path) -> None:
    """The two plans differ in what they protect alone, of which their settings say nothing."""
    source = sharded(vauban.organism_path("dense"), tmp_path / "source", 3)
    out = tmp_path / "out"
    killed_export(
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

    def read(energy: Energy) -> str:
        values = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
        inputs = {plan.updates[-1].path: (energy,)}
        return resume_key(CalibratedPlan(**values, inputs=inputs), source, None)

    keys = [
        key(),
        key(alpha=0.5),
        key(mode="column"),
        key(bias=True),
        key(rows=mx.ones((size, 1))),
        key(offset=mx.ones(size)),
        key(basis=plan.updates[-1].basis * -1),
        read(energy),
        read(dataclasses.replace(energy, rest=2 * energy.rest)),
        resume_key(plan, source, "float"),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0] == resume_key(plan, source, None)
