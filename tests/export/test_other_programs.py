"""Exported folders opened as other programs open them."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.utils import _get_classes

import vauban
from tests.export.checkpoints import load_plain, save_checkpoint, unit
from vauban._arrays import flat_parameters


def open_as_swift(folder: Path) -> nn.Module:
    """What MLX's Swift apps do: every .safetensors below the folder, every tensor a parameter."""
    config = json.loads((folder / "config.json").read_text())
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    weights: dict[str, mx.array] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        weights |= mx.load(str(file))
    packing = config.get("quantization")
    if packing:

        def form(path: str, module: nn.Module) -> Any:
            other = packing.get(path, True)
            return other if f"{path}.scales" in weights else False

        nn.quantize(model, packing["group_size"], packing["bits"], class_predicate=form)
    assert weights.keys() == flat_parameters(model).keys()
    model.load_weights(list(weights.items()), strict=True)
    return model


@pytest.mark.parametrize(
    ("bits", "shards", "precision"),
    [(0, 1, "same"), (0, 3, "same"), (4, 1, "same"), (4, 2, "8bit"), (4, 1, "float")],
)
def test_every_safetensors_file_below_the_folder_is_the_models(
    tmp_path: Path, bits: int, shards: int, precision: str
) -> None:
    source = save_checkpoint(tmp_path / "source", "llama", bits=bits, shards=shards)
    model, _ = vauban.load(source)
    plan = vauban.plan_cut(model, unit(), embedding=True)
    plan.export(source, tmp_path / "out", precision=precision)
    opened = open_as_swift(tmp_path / "out")
    tokens = mx.array([[1, 5, 7, 9]])
    # The same arrays in the same types: not a bit apart from what mlx-lm itself opens.
    assert mx.array_equal(opened(tokens), load_plain(tmp_path / "out")(tokens))


def test_a_whole_run_leaves_only_weights_with_their_suffix(tmp_path: Path) -> None:
    """Quick mode's folder, with card, direction and answers; and what is saved into it later."""
    path, out = vauban.organism_path("4bit"), tmp_path / "out"
    model, tokenizer = vauban.load(path)
    harmful, harmless = (
        vauban.load_prompts(path / "prompts" / f"{name}.jsonl")[:12]
        for name in ("harmful", "harmless")
    )
    result = vauban.measure(model, tokenizer, harmful, harmless)
    plan = vauban.plan_cut(model, result.direction)
    plan.export(path, out)
    for place in (out / "mine.safetensors", out / "vectors" / "mine", out / "vectors" / "b.vauban"):
        place.parent.mkdir(exist_ok=True)
        saved = result.save(place)
        assert saved.parent == place.parent and saved.suffix == ".vauban"
        assert vauban.DirectionResult.load(saved).to_dict() == result.to_dict()
    # A script that names the file as earlier versions did still finds it.
    again = vauban.DirectionResult.load(out / "mine.safetensors")
    assert mx.array_equal(again.direction, result.direction)
    open_as_swift(out)
    assert result.save(tmp_path / "v").name == "v.safetensors"


def test_a_folder_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """There direction and record ended in .safetensors."""
    source = save_checkpoint(tmp_path / "source", "llama")
    model, _ = vauban.load(source)
    plan = vauban.plan_cut(model, unit(), embedding=True)
    report = plan.export(source, tmp_path / "out")
    (tmp_path / "out" / "edit.vauban").rename(tmp_path / "out" / "edit.safetensors")
    again = vauban.verify_export(tmp_path / "out", source=source)
    assert again.ok and again.direction_left == report.direction_left
