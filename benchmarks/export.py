"""Export speed against plain copying: a synthetic sharded 4-bit checkpoint, cut and written.

Builds the checkpoint, checks the result, then prints seconds, the ratio to a read/write loop that
syncs and hashes the same bytes, and the peak memory above the process after its imports.
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

from vauban.edits import plan as plan_module
from vauban.export import verify_export
from vauban.export.checkpoint import draft_plan, open_source, write_edit_record, write_folder
from vauban.models.loading import check_folder

HIDDEN, HEADS, GROUP, BITS = 2048, 16, 64, 4


def build(folder: Path, gigabytes: float) -> None:
    """Random packed weights under mlx-lm's llama names, in shards of about 500 MB."""
    ff, vocabulary = 8192, 32000
    per_block = (4 * HIDDEN * HIDDEN + 3 * HIDDEN * ff) * (BITS / 8 + 4 / GROUP)
    blocks = max(2, int(gigabytes * 1e9 / per_block))
    config = {
        "model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": blocks,
        "intermediate_size": ff, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "rms_norm_eps": 1e-5, "vocab_size": vocabulary, "rope_theta": 10000.0,
        "max_position_embeddings": 2048, "tie_word_embeddings": False,
        "quantization": {"group_size": GROUP, "bits": BITS},
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN),
              "self_attn.v_proj": (HIDDEN, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
              "mlp.gate_proj": (ff, HIDDEN), "mlp.up_proj": (ff, HIDDEN),
              "mlp.down_proj": (HIDDEN, ff)}  # fmt: skip
    index: dict[str, str] = {}
    shard: dict[str, mx.array] = {}
    number = 0

    def packed(name: str, shape: tuple[int, int]) -> None:
        words = mx.random.randint(0, 2**31 - 1, (shape[0], shape[1] * BITS // 32)).astype(mx.uint32)
        scales = (0.01 * mx.random.normal((shape[0], shape[1] // GROUP))).astype(mx.bfloat16)
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
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shard[f"model.layers.{i}.{norm}.weight"] = mx.ones((HIDDEN,), dtype=mx.bfloat16)
        if sum(v.nbytes for v in shard.values()) > 500e6:
            flush()
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    check_folder(folder)


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
    return time.perf_counter() - started


def main() -> None:
    """Build, export, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--dir", type=Path, default=None, help="where to work (about 3x the size)")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        build(options.build, options.gigabytes)
        return
    root = Path(tempfile.mkdtemp(dir=options.dir))
    try:
        source = root / "source"
        # In a process of its own, so that the peak below is the export's.
        subprocess.run(
            [
                sys.executable,
                __file__,
                "--build",
                str(source),
                "--gigabytes",
                str(options.gigabytes),
            ],
            check=True,
        )
        size = sum(f.stat().st_size for f in source.glob("model*.safetensors"))
        from mlx_lm.utils import load_model

        model, _ = load_model(source, lazy=True)
        plan = vauban.plan_cut(model, mx.random.normal((HIDDEN,), key=mx.random.key(0)))
        del model
        rounding = 0.0
        original = plan_module.pack_edited

        def timed(*args: Any, **more: Any) -> Any:
            nonlocal rounding
            started = time.perf_counter()
            found = original(*args, **more)
            rounding += time.perf_counter() - started
            return found

        plan_module.pack_edited = timed
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        copying = plain_copy(source, root / "copy")
        shutil.rmtree(root / "copy")
        target = root / "out"
        target.mkdir()
        started = time.perf_counter()
        opened = open_source(source)
        draft = draft_plan(opened, plan, "same", "two-sided")
        write_folder(opened, draft, target)
        write_edit_record(plan, draft, "same", target)
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        report = verify_export(target, source=source)
        checking = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert report.ok and report.untouched_identical, report.summary()
        print(f"{size / 1e9:.2f} GB, {report.summary()}")
        print(f"plain copy with hash and sync {copying:6.1f} s ({size / 1e6 / copying:.0f} MB/s)")
        print(f"export                        {seconds:6.1f} s, of it rounding {rounding:.1f} s")
        rest = seconds - rounding
        print(
            f"export without rounding       {rest:6.1f} s: {copying / rest:.0%} of the copy's speed"
        )
        print(f"reading back and comparing    {checking:6.1f} s")
        largest = max(t.end - t.start for t in stored(source))
        print(
            f"peak memory {peak / 1e3 - base / 1e3:.0f} MB above the process before it; "
            f"limit {largest / 1e6 + 600:.0f} MB"
        )
    finally:
        shutil.rmtree(root)


def stored(folder: Path) -> list:
    """The stored tensors of a checkpoint."""
    from vauban.export.tensors import stored_tensors

    return list(stored_tensors(folder).values())


if __name__ == "__main__":
    main()
