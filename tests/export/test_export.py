"""What stands on disk after an export, read back independently with mlx-lm and NumPy."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import vauban
from tests.conftest import random_tokens
from tests.export.checkpoints import load_plain, matrix_of, save_checkpoint, unit
from vauban.export.tensor_files import stored_tensors


@pytest.mark.parametrize(
    ("name", "bits", "shards"),
    [("llama", 0, 1), ("llama_bias", 0, 3), ("qwen3", 0, 1), ("qwen3", 4, 2), ("qwen3_moe", 4, 1),
     ("qwen3_moe", 0, 2), ("gemma2", 0, 1), ("gemma2", 8, 1), ("olmo2", 0, 1)],
)  # fmt: skip
def test_exported_folder_is_the_planned_edit(
    tmp_path: Path, name: str, bits: int, shards: int
) -> None:
    source = save_checkpoint(tmp_path / "source", name, bits=bits, shards=shards)
    model, _ = vauban.load(source)
    plan = vauban.plan_cut(model, unit(), embedding=True)
    report = plan.export(source, tmp_path / "out")
    assert report.ok and report.untouched_identical is True
    assert report.modules_edited == report.modules_present == len(vauban.residual_writers(model))
    assert report.direction_left <= 0.01
    tokens = random_tokens(1, 14)
    virtual = vauban.forward(model, tokens, interventions=plan.virtual()).logits
    exported, _ = vauban.load(tmp_path / "out")
    if not bits:
        # Both run in float32; the rounding of the edited weights to bfloat16 is what differs.
        difference = float(mx.abs(vauban.forward(exported, tokens).logits - virtual).max())
        uncut = float(mx.abs(vauban.forward(model, tokens).logits - virtual).max())
        assert difference <= 0.05 * uncut
    written = load_plain(tmp_path / "out")
    # Independent reading: each writer's output direction, in NumPy from the file.
    modules = dict(written.named_modules())
    for writer in vauban.residual_writers(written):
        weight = np.array(matrix_of(modules[writer.path]), dtype=np.float64)
        u = np.array(unit(), dtype=np.float64)
        u = u * np.array(writer.gain) if writer.gain is not None else u
        u = u / np.linalg.norm(u)
        rows = weight if writer.kind == "embedding" else np.swapaxes(weight, -1, -2)
        assert np.linalg.norm(rows @ u) <= 0.01 * np.linalg.norm(rows), writer.path


def test_float32_export_is_exact(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama", dtype=mx.float32)
    report = vauban.plan_cut(load_plain(source), unit(), embedding=True).export(
        source, tmp_path / "out"
    )
    assert report.direction_left <= 1e-6


def test_untouched_tensors_keep_their_bytes(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama", shards=2)
    plan = vauban.plan_cut(load_plain(source), unit(), layers=[1], embedding=False)
    plan.export(source, tmp_path / "out")
    before, after = stored_tensors(source), stored_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {n for n in before if b"".join(before[n].chunks()) != b"".join(after[n].chunks())}
    assert changed == {
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    }


def test_a_checkpoint_in_hugging_faces_layout(tmp_path: Path) -> None:
    """Experts stored one by one are stacked by mlx-lm on loading, and written one by one again."""
    source = save_checkpoint(tmp_path / "source", "qwen3_moe")
    weights = mx.load(str(source / "model.safetensors"))
    split = {}
    for name, value in weights.items():
        if "switch_mlp" in name:
            for e in range(value.shape[0]):
                split[name.replace("switch_mlp", f"experts.{e}")] = value[e]
        else:
            split[name] = value
    mx.eval(split)
    mx.save_safetensors(str(source / "model.safetensors"), split, {"format": "pt"})
    plan = vauban.plan_cut(load_plain(source), unit(), embedding=True)
    report = plan.export(source, tmp_path / "out")
    assert report.ok and report.modules_edited == report.modules_present
    assert stored_tensors(tmp_path / "out").keys() == split.keys() | {"lm_head.weight"}


@pytest.mark.parametrize("bits", [3, 4])
def test_a_packed_export_keeps_its_format_and_loses_the_direction(
    tmp_path: Path, bits: int
) -> None:
    """Same bits, same size, direction gone; 8 bits and float where asked."""
    source = save_checkpoint(tmp_path / "source", "llama", bits=bits)
    model, _ = vauban.load(source)
    plan = vauban.plan_cut(model, unit(), embedding=True)
    same = plan.export(source, tmp_path / "same")
    assert same.direction_left <= 1e-3
    assert {f["bits"] for f in same.stored.values()} == {bits}
    sizes = [
        sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        for folder in (source, tmp_path / "same")
    ]
    assert abs(sizes[1] - sizes[0]) <= 1e-3 * sizes[0]
    wide = plan.export(source, tmp_path / "wide", precision="8bit")
    assert wide.direction_left <= 1e-3 and {f["bits"] for f in wide.stored.values()} == {8}
    assert load_plain(tmp_path / "wide").model.layers[1].mlp.down_proj.bits == 8
    assert load_plain(tmp_path / "wide").model.layers[1].mlp.up_proj.bits == bits
    loose = plan.export(source, tmp_path / "float", precision="float")
    assert all(f["mode"] == "float" for f in loose.stored.values())
    # Packing naively instead would leave most of a weak direction in the matrix.
    module = model.model.layers[1].mlp.down_proj
    before = matrix_of(module)
    target = before - unit()[:, None] * (unit() @ before)
    naive = mx.quantize(target, group_size=32, bits=bits)
    left = unit() @ mx.dequantize(*naive, group_size=32, bits=bits)
    assert float(mx.linalg.norm(left) / mx.linalg.norm(unit() @ before)) > 100 * same.direction_left


def test_an_untied_head_keeps_the_packing_of_the_embedding(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "qwen3", bits=4)
    model, _ = vauban.load(source)
    report = vauban.plan_cut(model, unit(), embedding=True).export(source, tmp_path / "out")
    written = load_plain(tmp_path / "out")
    assert report.ok and written.lm_head.bits == 4
    assert mx.array_equal(written.lm_head.weight, model.model.embed_tokens.weight)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
