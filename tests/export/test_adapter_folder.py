"""The adapter folder: the same cut, read back through mlx-lm."""

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.utils import load_model

import vauban
from tests.architectures import build as architectures
from tests.conftest import random_tokens
from tests.export.checkpoints import load_plain, save_checkpoint, unit
from tests.export.test_layout import foreign as hugging_face
from vauban.export import check_adaptable
from vauban.export.adapter import adapter_shares
from vauban.export.source import open_source


@pytest.mark.parametrize(
    ("name", "bits"), [("llama", 0), ("llama", 4), ("qwen3_moe", 0), ("qwen3_moe", 4), ("gemma", 0)]
)
def test_an_adapter_is_the_same_cut(tmp_path: Path, name: str, bits: int) -> None:
    """Rank 1 per writer, experts and embedding included, opened by mlx-lm's own loader."""
    source = save_checkpoint(tmp_path / "source", name, bits=bits, dtype=mx.float32)
    model, _ = vauban.load(source)
    plan = vauban.plan_cut(model, unit(), embedding=True)
    report = plan.export(source, tmp_path / "out", precision="adapter")
    assert report.ok and report.precision == "adapter" and report.direction_left <= 1e-5
    names = ["adapter_config.json", "adapters.safetensors"]
    # PEFT's beside it where transformers reads the source: floats, no stacks, the input alone.
    if bits or name in ("qwen3_moe", "gemma"):
        assert report.notes[0].startswith("no PEFT adapter")
    else:
        names.append("peft")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    adapted, _ = mlx_lm.load(str(source), adapter_path=str(tmp_path / "out"))
    tokens = random_tokens(1, 13)
    virtual = vauban.forward(model, tokens, interventions=plan.virtual()).logits
    scale = float(mx.abs(virtual).max())
    assert float(mx.abs(adapted(tokens) - virtual).max()) <= 2e-3 * scale
    uncut = float(mx.abs(model(tokens) - virtual).max())
    assert uncut > 0.02 * scale


def test_what_an_adapter_cannot_hold_is_refused(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama_bias")
    model = load_plain(source)
    tied = save_checkpoint(tmp_path / "tied", "qwen3")
    for plan, path, message in (
        (vauban.plan_cut(model, unit(), embedding=True), source, "has a bias"),
        (vauban.plan_cut(model, unit(), norm_preserve="column"), source, "low-rank"),
        (vauban.plan_cut(load_plain(tied), unit(), embedding=True), tied, "tied head"),
    ):
        with pytest.raises(vauban.InputError, match=message):
            plan.export(path, tmp_path / "out", precision="adapter")
        assert not (tmp_path / "out").exists()
    plan = vauban.plan_cut(load_plain(tied), unit(), embedding="tied")
    assert plan.export(tied, tmp_path / "out", precision="adapter").ok
    with pytest.raises(vauban.InputError, match="precision"):
        plan.export(tied, tmp_path / "other", precision="2bit")
    ternary = vauban.plan_cut(architectures.build("bitnet"), unit())
    with pytest.raises(vauban.InputError, match="BitLinear"):
        check_adaptable(ternary)


def test_an_adapter_of_a_partial_cut_is_judged_by_what_was_planned(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "source", "llama")
    plan = vauban.plan_cut(load_plain(path), unit(), alpha=-1.0, sparse=0.5)
    report = plan.export(path, tmp_path / "out", precision="adapter")
    assert report.ok and report.expected_left is None and report.direction_left > 1.1
    assert max(report.missed.values()) < 1e-5
    weaker = vauban.plan_cut(load_plain(path), unit(), alpha=-0.9, sparse=0.5)
    _, missed = adapter_shares(weaker, open_source(path), tmp_path / "out")
    assert min(missed.values()) > 0.02


def test_an_adapter_is_read_back_from_its_file(tmp_path: Path) -> None:
    """What mlx-lm makes of the folder counts, not what was meant to be in it."""
    path = save_checkpoint(tmp_path / "source", "qwen3_moe", bits=4)
    plan = vauban.plan_cut(load_plain(path), unit())
    folder = tmp_path / "out"
    plan.export(path, folder, precision="adapter")
    source = open_source(path)
    assert max(adapter_shares(plan, source, folder)[0].values()) <= 1e-5
    file = folder / "adapters.safetensors"
    arrays = dict(mx.load(str(file)))
    halved = {name: v / 2 if name.endswith("lora_b") else v for name, v in arrays.items()}
    mx.save_safetensors(str(file), halved, {"format": "mlx"})
    half = pytest.approx({u.path: 0.5 for u in plan.updates}, abs=1e-4)
    assert adapter_shares(plan, source, folder) == (half, half)
    mx.save_safetensors(str(file), {**arrays, "model.nowhere.lora_a": mx.ones((1,))})
    with pytest.raises(vauban.CheckError, match="nowhere"):
        adapter_shares(plan, source, folder)[0]
    config = json.loads((folder / "adapter_config.json").read_text())
    config["lora_parameters"]["keys"].pop()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(
        str(file), {n: v for n, v in arrays.items() if plan.updates[-1].path not in n}
    )
    with pytest.raises(vauban.CheckError, match=plan.updates[-1].path):
        adapter_shares(plan, source, folder)[0]
    with pytest.raises(vauban.InputError, match="adapter_path"):
        vauban.verify_export(folder, source=path)


@pytest.mark.parametrize("foreign", [False, True])
def test_pefts_factors_make_the_same_matrices(tmp_path: Path, foreign: bool) -> None:
    """W + B A by PEFT's names, in float64, against what plan.apply leaves in memory."""
    if foreign:
        source = hugging_face(tmp_path / "source", "qwen3_vl")
    else:
        source = save_checkpoint(tmp_path / "source", "llama", dtype=mx.float32)
    model = load_model(source)[0]
    plan = vauban.plan_cut(model, unit(), embedding=not foreign)
    assert plan.export(source, tmp_path / "out", "adapter").notes == ()
    config = json.loads((tmp_path / "out/peft/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] and config["peft_type"] == "LORA"
    tensors = dict(mx.load(str(tmp_path / "out/peft/adapter_model.safetensors")))
    stored = {n: v for f in source.glob("model*.safetensors") for n, v in mx.load(str(f)).items()}
    same = plan.export(source, tmp_path / "weights", calibrate=False)
    assert same.ok
    expected = {
        n: v
        for f in (tmp_path / "weights").glob("model*.safetensors")
        for n, v in mx.load(str(f)).items()
    }
    for module in config["target_modules"]:
        before, after = (np.array(w[f"{module}.weight"], np.float64) for w in (stored, expected))
        key = f"base_model.model.{module}"
        if "embed_tokens" in module:
            a, b = (np.array(tensors.pop(f"{key}.lora_embedding_{s}"), np.float64) for s in "AB")
            change = (b @ a).T
        else:
            a, b = (np.array(tensors.pop(f"{key}.lora_{s}.weight"), np.float64) for s in "AB")
            change = b @ a
        assert np.abs(before + change - after).max() < 1e-5
    assert not tensors
    assert len(config["target_modules"]) == len(plan.updates)
