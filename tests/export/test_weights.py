"""`export_model`: a flat dictionary of weights as a folder."""

import json
from pathlib import Path

import mlx.core as mx
import pytest

import vauban
from tests.export.checkpoints import load_plain, save_checkpoint, unit
from vauban._arrays import flat_parameters


def test_export_model_writes_packed_writers_as_floats(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "qwen3", bits=4)
    model = load_plain(source)
    done = vauban.cut(flat_parameters(model), unit(), range(4))
    folder = vauban.export_model(source, done, tmp_path / "out")
    written = load_plain(folder)
    assert not hasattr(written.model.layers[0].mlp.down_proj, "scales")
    assert hasattr(written.model.layers[0].mlp.up_proj, "scales")
    assert (
        mx.abs(unit() @ written.model.layers[0].mlp.down_proj.weight.astype(mx.float32)).max()
        < 0.02
    )
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"]["model.layers.0.mlp.down_proj"] is False


def test_export_model_checks_the_dictionary(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama")
    weights = flat_parameters(load_plain(source))
    name = "model.layers.0.mlp.down_proj.weight"
    cases = [
        ({n: v for n, v in weights.items() if n != name}, "lack model.layers.0.mlp.down_proj"),
        ({**weights, "extra.weight": mx.ones(1)}, r"hold extra\.weight"),
        ({**weights, name: mx.ones((3, 3))}, r"has shape \(3, 3\)"),
        ({**weights, name: mx.full((64, 96), float("nan"))}, "NaN or inf"),
    ]
    for bad, message in cases:
        with pytest.raises(vauban.InputError, match=message):
            vauban.export_model(source, bad, tmp_path / "out")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
