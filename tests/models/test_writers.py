"""Residual writers, kinds and gains on real classes."""

from typing import Any

import numpy as np
import pytest

import vauban
from tests.conftest import TINY
from vauban.models import norm_gain


def test_kinds_and_shapes(tiny: Any) -> None:
    writers = vauban.residual_writers(tiny("qwen3_moe"))
    assert writers[0].kind == "embedding" and writers[0].layer == -1
    assert [w.kind for w in writers[1:3]] == ["attention", "expert"]
    assert writers[2].shape == (4, 64, 32)
    assert writers[2].path == "model.layers.0.mlp.switch_mlp.down_proj"
    assert len(writers) == 1 + 2 * 4


@pytest.mark.parametrize("name", sorted(TINY))
def test_paths_are_those_of_named_modules(tiny: Any, name: str) -> None:
    model = tiny(name)
    modules = dict(model.named_modules())
    for writer in vauban.residual_writers(model):
        assert writer.path in modules
        assert writer.bias == ("bias" in modules[writer.path])


@pytest.mark.parametrize(
    ("name", "post"),
    [
        ("llama", None),
        ("gemma2", ("post_attention_layernorm", "post_feedforward_layernorm")),
        ("olmo2", ("post_attention_layernorm", "post_feedforward_layernorm")),
        ("glm4", ("post_self_attn_layernorm", "post_mlp_layernorm")),
    ],
)
def test_gains_are_those_of_the_post_norms(tiny: Any, name: str, post: Any) -> None:
    """Read off numerically, so Gemma's 1 + w needs no special case."""
    model = tiny(name)
    attention, mlp = vauban.residual_writers(model)[1:3]
    if post is None:
        assert attention.gain is None and mlp.gain is None
        return
    layer = model.model.layers[0]
    for writer, norm in zip((attention, mlp), post, strict=True):
        weight = layer[norm].weight + (1.0 if name == "gemma2" else 0.0)
        assert np.allclose(writer.gain, weight, rtol=1e-4)
        assert np.allclose(norm_gain(layer[norm], 64), writer.gain)


def test_a_block_without_writers_is_an_error(tiny: Any) -> None:
    model = tiny("llama")
    layer = model.model.layers[1]
    layer.self_attn.output = layer.self_attn.pop("o_proj")
    layer.mlp.output = layer.mlp.pop("down_proj")
    with pytest.raises(vauban.ArchitectureError, match="block 1"):
        vauban.residual_writers(model)


def test_a_model_without_blocks_is_an_error() -> None:
    import mlx.nn as nn

    with pytest.raises(vauban.ArchitectureError, match="no `layers`"):
        vauban.residual_writers(nn.Linear(2, 2))
