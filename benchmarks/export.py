"""Export speed against plain copying: a synthetic sharded 4-bit checkpoint, cut and written.

Builds the checkpoint, checks the result, then prints seconds, the ratio to a read/write loop that
syncs and hashes the same bytes (rounding left out), and the peak memory above the process after its
imports.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import vauban  # before mlx: OpenBLAS

# isort: split
import mlx.core as mx
from mlx_lm.utils import load_model

from vauban.edits import EditPlan
from vauban.export import checkpoint, resume_key, verify_export
from vauban.export.checkpoint import draft_plan, write_folder
from vauban.export.edit_record import write_edit_record
from vauban.export.source import open_source
from vauban.export.tensor_files import sha256, stored_tensors
from vauban.models.loading import check_folder

HIDDEN, HEADS, GROUP, BITS = 2048, 16, 64, 4
# Share of the copy's speed, rounding left out; MB above the largest stored tensor.
SPEED, ROOM = 0.5, 600


def build(folder: Path, gigabytes: float, experts: int) -> None:
    """Random packed weights under mlx-lm's names, in shards of about 500 MB.

    Of a llama, or with `experts` of a Qwen3 mixture, whose stacks are the largest tensors.
    """
    ff, vocabulary = 8192, 32000
    weights = 4 * HIDDEN * HIDDEN + max(1, experts) * 3 * HIDDEN * ff
    per_block = weights * (BITS / 8 + 4 / GROUP)
    blocks = max(2, int(gigabytes * 1e9 / per_block))
    config = {
        "model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": blocks,
        "intermediate_size": ff, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "rms_norm_eps": 1e-5, "vocab_size": vocabulary, "rope_theta": 10000.0,
        "max_position_embeddings": 2048, "tie_word_embeddings": False,
        "quantization": {"group_size": GROUP, "bits": BITS},
    }  # fmt: skip
    if experts:
        config |= {
            "model_type": "qwen3_moe", "head_dim": HIDDEN // HEADS, "num_experts": experts,
            "num_experts_per_tok": 2, "moe_intermediate_size": ff, "decoder_sparse_step": 1,
            "mlp_only_layers": [], "norm_topk_prob": True, "rms_norm_eps": 1e-6,
        }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    mlp, stack = ("mlp.switch_mlp", (experts,)) if experts else ("mlp", ())
    shapes: dict[str, tuple[int, ...]] = {
        **{f"self_attn.{n}_proj": (HIDDEN, HIDDEN) for n in "qkvo"},
        **{f"{mlp}.{n}_proj": (*stack, ff, HIDDEN) for n in ("gate", "up")},
        f"{mlp}.down_proj": (*stack, HIDDEN, ff),
    }
    index: dict[str, str] = {}
    shard: dict[str, mx.array] = {}
    number = 0

    def packed(name: str, shape: tuple[int, ...]) -> None:
        *rows, width = shape
        words = mx.random.randint(0, 2**31 - 1, (*rows, width * BITS // 32)).astype(mx.uint32)
        scales = (0.01 * mx.random.normal((*rows, width // GROUP))).astype(mx.bfloat16)
        shard.update(
            {f"{name}.weight": words, f"{name}.scales": scales, f"{name}.biases": -8 * scales}
        )

    def flush() -> None:
        nonlocal number
        number += 1
        file = f"model-{number:05d}.safetensors"
        mx.save_safetensors(str(folder / file), shard, {"format": "mlx"})
        index.update(dict.fromkeys(shard, file))
        shard.clear()

    packed("model.embed_tokens", (vocabulary, HIDDEN))
    packed("lm_head", (vocabulary, HIDDEN))
    shard["model.norm.weight"] = mx.ones((HIDDEN,), dtype=mx.bfloat16)
    for i in range(blocks):
        for name, shape in shapes.items():
            packed(f"model.layers.{i}.{name}", shape)
            if sum(v.nbytes for v in shard.values()) > 500e6:
                flush()
        norms = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}
        if experts:
            norms |= {f"self_attn.{n}_norm": HIDDEN // HEADS for n in "qk"}
            gate = mx.random.normal((experts, HIDDEN)).astype(mx.bfloat16)
            shard[f"model.layers.{i}.mlp.gate.weight"] = gate
        for norm, size in norms.items():
            shard[f"model.layers.{i}.{norm}.weight"] = mx.ones((size,), dtype=mx.bfloat16)
        if sum(v.nbytes for v in shard.values()) > 500e6:
            flush()
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    check_folder(folder)
    settle(folder)


def settle(folder: Path) -> None:
    """Wait until a folder's weights are on the disk: no one else is to pay for writing them."""
    for file in sorted(folder.glob("model*.safetensors")):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def plain_copy(source: Path, target: Path) -> float:
    """Read, hash, write and sync every weight file: what any export has to do at least."""
    target.mkdir()
    started = time.perf_counter()
    for file in sorted(source.glob("model*.safetensors")):
        digest = hashlib.sha256()
        with file.open("rb") as reader, (target / file.name).open("wb") as writer:
            while piece := reader.read(1 << 24):
                digest.update(piece)
                writer.write(piece)
            writer.flush()
            os.fsync(writer.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def export(plan: EditPlan, source: Path, target: Path) -> tuple[float, list[float]]:
    """What `write_plan` does up to reading back: seconds, and of them those of every rounding.

    Matrices are rounded one after another by the thread that writes, so their wall times add up.
    """
    rounding: list[float] = []
    original = checkpoint.store_packed

    def timed(module: Any, *args: Any, **more: Any) -> Any:
        # Neither reading the matrix nor writing what is still in the page cache may hide in it.
        mx.eval(module.parameters())
        settle(target)
        started = time.perf_counter()
        found = original(module, *args, **more)
        rounding.append(time.perf_counter() - started)
        return found

    checkpoint.store_packed = timed
    target.mkdir()
    started = time.perf_counter()
    opened = open_source(source)
    key = resume_key(plan, opened.folder, "same")
    draft = draft_plan(opened, plan, "same")
    placement = write_folder(opened, draft, target, key)
    write_edit_record(plan, opened, draft, "same", target, placement, placement.notes)
    seconds = time.perf_counter() - started
    checkpoint.store_packed = original
    assert len(rounding) == len(plan.updates), "not every matrix was rounded by store_packed"
    return seconds, rounding


def memory(what: str) -> float:
    """MB resident now ("VmRSS") or at most so far ("VmHWM"); without /proc the latter for both.

    Not ru_maxrss on Linux: that starts with the peak of the process that started this one.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    facts = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(facts[what].split()[0]) * 1024 / 1e6


def compare(source: Path, root: Path, imported: float) -> None:
    """Copy, plan, export, check, copy again, print."""
    before = plain_copy(source, root / "copy")
    model, _ = load_model(source, lazy=True)
    plan = vauban.plan_cut(model, mx.random.normal((HIDDEN,), key=mx.random.key(0)), embedding=True)
    target = root / "out"
    seconds, rounding = export(plan, source, target)
    started = time.perf_counter()
    hashes = {f.name: sha256(f) for f in sorted(target.glob("model*.safetensors"))}
    hashing = time.perf_counter() - started
    started = time.perf_counter()
    report = verify_export(target, source=source)
    checking = time.perf_counter() - started
    peak = memory("VmHWM") - imported
    assert report.ok and report.untouched_identical, report.summary()
    assert report.files == hashes
    after = plain_copy(source, root / "copy")

    stored = stored_tensors(source).values()
    size = sum(t.end - t.start for t in stored)
    copying, rest = min(before, after), seconds - sum(rounding)
    print(f"{size / 1e9:.2f} GB, {report.summary()}")
    print(f"export                           {seconds:6.1f} s")
    print(f"  of it rounding {len(rounding):4} matrices  {sum(rounding):6.1f} s")
    print(
        f"copy with hashes and sync        {copying:6.1f} s  {size / 1e6 / copying:5.0f} MB/s, the "
        f"faster of one before ({before:.1f} s) and one after ({after:.1f} s)"
    )
    for name, took in {
        "export without rounding": rest,
        "  with the hashes": rest + hashing,
        "  with all of verify_export": rest + checking,
    }.items():
        speed = f"{took:6.1f} s  {size / 1e6 / took:5.0f} MB/s"
        print(f"{name:32} {speed}, {copying / took:.0%} of the copy's (target {SPEED:.0%})")
    largest = max(t.end - t.start for t in stored) / 1e6
    print(
        f"peak memory {peak:.0f} MB above the {imported:.0f} MB after the imports; "
        f"limit {largest:.0f} + {ROOM} MB"
    )


def main() -> None:
    """Build in a process of its own, so that the peak is the export's; then compare."""
    imported = memory("VmRSS")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--dir", type=Path, default=None, help="where to work (about 3x the size)")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--experts", type=int, default=0, help="a mixture of so many per block")
    options = parser.parse_args()
    if options.build:
        build(options.build, options.gigabytes, options.experts)
        return
    root = Path(tempfile.mkdtemp(dir=options.dir))
    try:
        source = root / "source"
        size = ["--gigabytes", str(options.gigabytes), "--experts", str(options.experts)]
        subprocess.run([sys.executable, __file__, "--build", str(source), *size], check=True)
        compare(source, root, imported)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
