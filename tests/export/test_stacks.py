"""Stacks of experts: read one by one, written one by one, and the same as mlx-lm's own."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

import vauban
from tests.export.test_memory import _CONFIG, one_by_one
from vauban.edits.modules import module_weight
from vauban.export import tensor_files
from vauban.export.checkpoint import draft_plan, write_folder
from vauban.export.expert_stacks import stack_origins
from vauban.export.source import open_source
from vauban.export.tensor_files import TensorOnDisk, stored_tensors, to_bytes

_MANY = {
    **_CONFIG, "hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 160,
    "num_hidden_layers": 1, "vocab_size": 64,
}  # fmt: skip
KINDS = ("one by one", "stacked", "packed")


def folder_of(tmp_path: Path, kind: str) -> Path:
    """A mixture-of-experts checkpoint as Hugging Face has it, as mlx-lm has it, and in 4 bits."""
    from mlx_lm.utils import save_model

    source = one_by_one(tmp_path / "source", _MANY)
    if kind == "one by one":
        return source
    model, config = load_model(source)
    if kind == "packed":
        nn.quantize(model, group_size=64, bits=4)
        config["quantization"] = {"group_size": 64, "bits": 4}
    save_model(tmp_path / kind, model, donate_model=False)
    (tmp_path / kind / "config.json").write_text(json.dumps(config))
    return tmp_path / kind


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_what_mlx_lm_loads(tmp_path: Path, kind: str) -> None:
    folder = folder_of(tmp_path, kind)
    opened = open_source(folder)
    assert opened.same_layout is (kind != "one by one")
    loaded = dict(tree_flatten(load_model(folder)[0].parameters()))
    expected = {name for name in loaded if "switch_mlp" in name}
    assert opened.stacks.keys() == expected and len(expected) == (9 if kind == "packed" else 3)
    for name, stack in opened.stacks.items():
        value = loaded[name]
        assert stack.shape == tuple(value.shape) and stack.dtype == value.dtype
        assert opened.modules[name.rpartition(".")[0]][name.rpartition(".")[2]] is stack
        for expert in (0, 7, 159):
            assert mx.array_equal(stack[expert], value[expert]), name
        assert b"".join(stack.chunks()) == to_bytes(value)
    path = "model.layers.0.mlp.switch_mlp.down_proj"
    whole = module_weight(dict(load_model(folder)[0].named_modules())[path])
    assert mx.array_equal(module_weight(opened.modules[path]), whole)


@pytest.mark.parametrize("size", [1, 5, 1000, 1 << 20])
def test_bytes_are_cut_where_stored_tensors_are(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "_CHUNK", 64)
    whole = bytes(range(256)) * 3 + b"end"
    pieces = list(tensor_files.rechunked(whole[i : i + size] for i in range(0, len(whole), size)))
    assert b"".join(pieces) == whole
    assert [len(p) for p in pieces] == [64] * (len(whole) // 64) + [len(whole) % 64]


@pytest.mark.parametrize(("kind", "held"), [("one by one", 0.3), ("stacked", 0.3), ("packed", 1.5)])
def test_no_stack_is_held_twice(tmp_path: Path, kind: str, held: float) -> None:
    """Of floats no stack is held at all, of packed experts what they are rounded to."""
    folder = folder_of(tmp_path, kind)
    opened = open_source(folder)
    plan = vauban.plan_cut(opened.model, mx.random.normal((256,), key=mx.random.key(0)))
    largest = max(t.end - t.start for t in stored_tensors(folder).values())
    if kind == "one by one":
        largest *= 160
    draft = draft_plan(opened, plan, "same")
    out = tmp_path / "out"
    out.mkdir()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    write_folder(opened, draft, out)
    assert mx.get_peak_memory() - before < held * largest
    edited = {u.path for u in plan.updates}
    written = dict(tree_flatten(load_model(out)[0].parameters()))
    for name, value in tree_flatten(load_model(folder)[0].parameters()):
        path, _, key = name.rpartition(".")
        same = bool(mx.array_equal(value, written[name]))
        assert same if path not in edited else key != "weight" or not same, name


def test_an_array_that_was_turned_on_loading_is_not_read_from_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Square, so that its name, shape and type in the file are those of the parameter."""
    from mlx_lm.models import qwen3_moe

    folder = folder_of(tmp_path, "stacked")
    name = "model.layers.0.mlp.switch_mlp.down_proj.weight"

    def turned(self: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return {n: w.swapaxes(1, 2) if n == name else w for n, w in weights.items()}

    monkeypatch.setattr(qwen3_moe.Model, "sanitize", turned)
    opened = open_source(folder)
    assert name not in opened.stacks and len(opened.stacks) == 2
    value = opened.modules[name.removesuffix(".weight")].weight
    assert mx.array_equal(value, mx.load(str(folder / "model.safetensors"))[name].swapaxes(1, 2))


@pytest.mark.parametrize("change", ["turned", "scaled", "other order of axes"])
def test_only_stored_tensors_and_plain_stacks_of_them_are_stacks(change: str) -> None:
    """What a conversion does besides stacking keeps a parameter out, and only that one."""
    changes = {
        "turned": lambda parts: mx.stack([p.T for p in parts]),
        "scaled": lambda parts: mx.stack([2 * p for p in parts]),
        "other order of axes": lambda parts: mx.stack(parts, axis=1),
    }

    class Converting(nn.Module):
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            assert weights["x.0.y.0.scale"].shape == ()
            parts = {k: [weights[f"x.{e}.y.0.{k}"] for e in (1, 0)] for k in ("a", "b")}
            return {
                "plain": mx.stack(parts["a"]),
                "changed": changes[change](parts["b"]),
                "whole": weights["x.whole"],
            }

    stored = {
        name: TensorOnDisk(Path("model.safetensors"), "F32", shape, 0, 4)
        for name, shape in [
            *((f"x.{e}.y.0.{k}", (8, 8)) for e in (0, 1) for k in ("a", "b")),
            ("x.whole", (2, 8, 8)),
            ("norm", (8,)),
            # A scale of one expert is a single number; it must stay one in the rehearsal.
            ("x.0.y.0.scale", ()),
        ]
    }
    origins = stack_origins(Converting(), ["plain", "changed", "whole"], stored)
    assert origins == {"plain": ["x.1.y.0.a", "x.0.y.0.a"], "whole": ["x.whole"]}


def test_a_conversion_that_needs_true_shapes_has_no_stacks() -> None:
    class Shaped(nn.Module):
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            return {"w": weights["x.w"].reshape(2, 8, 8)}

    stored = {"x.w": TensorOnDisk(Path("model.safetensors"), "F32", (2, 8, 8), 0, 512)}
    assert stack_origins(Shaped(), ["w"], stored) == {}
