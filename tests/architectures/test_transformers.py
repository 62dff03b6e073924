"""Parity with Hugging Face transformers: hidden states of every layer at every position.

Against committed fixtures (see `make_hf_fixtures.py`), and live where torch is installed.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import vauban
from tests.architectures.make_hf_fixtures import (
    FAMILIES,
    FOLDER,
    hidden_states,
    stored_weights,
    transformers_model,
)


def loaded(name: str, config: dict[str, Any], weights: dict[str, mx.array]) -> nn.Module:
    """mlx-lm's class with transformers' weights, through mlx-lm's own renaming."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    model = module.Model(module.ModelArgs.from_dict(config))
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)
    model.load_weights(list(weights.items()), strict=True)
    return model.eval()


def compare(model: nn.Module, tokens: mx.array, hidden: mx.array, logits: mx.array) -> None:
    out = vauban.forward(model, tokens, positions="all")
    assert vauban.verify_forward(model).path == "manual"
    assert out.residual.shape[1:] == hidden.shape
    scale = float(mx.abs(hidden).max())
    for residual in range(hidden.shape[0]):
        worst = mx.abs(out.residual[0, residual] - hidden[residual]).max().item()
        assert worst <= 1e-4 * max(1.0, scale), residual
    assert mx.abs(out.logits[0] - logits).max().item() <= 1e-4 * float(mx.abs(logits).max())


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_hidden_state_equals_that_of_transformers(name: str) -> None:
    arrays, facts = mx.load(str(FOLDER / f"{name}.safetensors"), return_metadata=True)
    weights = {k.removeprefix("weights."): v for k, v in arrays.items() if k.startswith("weights.")}
    model = loaded(name, json.loads(facts["config"]), weights)
    compare(model, arrays["tokens"], arrays["hidden"], arrays["logits"])


def test_a_scaled_weight_is_seen() -> None:
    """The comparison itself can fail: one matrix a hundredth larger is beyond the tolerance."""
    arrays, facts = mx.load(str(FOLDER / "llama.safetensors"), return_metadata=True)
    weights = {k.removeprefix("weights."): v for k, v in arrays.items() if k.startswith("weights.")}
    model = loaded("llama", json.loads(facts["config"]), weights)
    model.model.layers[1].mlp.down_proj.weight *= 1.01
    with pytest.raises(AssertionError):
        compare(model, arrays["tokens"], arrays["hidden"], arrays["logits"])


def test_fixtures_stay_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 2 * 2**20


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_live_comparison(name: str) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    other = transformers_model(name, seed=1)
    tokens = torch.arange(19)[None] * 11 % 90
    hidden, logits = hidden_states(other, tokens)
    weights = {key: mx.array(value.numpy()) for key, value in stored_weights(other).items()}
    model = loaded(name, {**other.config.to_dict(), "model_type": name}, weights)
    compare(
        model,
        mx.array(tokens.numpy().astype(np.int32)),
        mx.array(hidden.numpy()),
        mx.array(logits.numpy()),
    )
