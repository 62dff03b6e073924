"""The flat cut finds, by names alone, what the plan finds on the modules: on every architecture."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import vauban
from tests.architectures.build import build, names
from vauban._arrays import flat_parameters
from vauban.models import anatomy

# What a dictionary does not show: a norm behind the writers, own packings, blocks elsewhere.
REASONS = "a norm stands between|a packing that mlx does not know|writes 16|does not exist"


def direction(model: Any) -> mx.array:
    return mx.random.normal((anatomy(model).d_model,), key=mx.random.key(4))


@pytest.mark.parametrize("name", names())
def test_a_flat_cut_is_the_plan_or_is_refused(name: str) -> None:
    model = build(name)
    d, weights = direction(model), flat_parameters(model)
    blocks = {w.layer for w in vauban.residual_writers(model)} - {-1}
    try:
        done = vauban.cut(weights, d, sorted(blocks))
    except vauban.InputError as error:
        # Only for one of the known reasons, so that a new refusal is looked at.
        with pytest.raises(vauban.InputError, match=REASONS):
            raise error
        return
    vauban.plan_cut(model, d, embedding=False).apply(model)
    after = flat_parameters(model)
    assert done.keys() == after.keys()
    for key, value in after.items():
        assert np.allclose(np.array(value), np.array(done[key]), atol=1e-5), key


def test_rwkv7_is_cut_on_both_sides() -> None:
    """Its channel mixing writes through `ffn.value`, a reader's name elsewhere."""
    model = build("rwkv7")
    d, weights = direction(model), flat_parameters(model)
    done = vauban.cut(weights, d, [1])
    unit = d / mx.linalg.norm(d)
    for name in ("attn.o_proj", "ffn.value"):
        key = f"model.layers.1.{name}.weight"
        assert mx.abs(unit @ weights[key]).max().item() > 1e-2
        assert mx.abs(unit @ done[key]).max().item() <= 1e-6


def test_an_mlp_whose_writer_has_an_unknown_name_is_refused(tiny: Any) -> None:
    weights = {
        name.replace("mlp.down_proj", "mlp.backward"): value
        for name, value in flat_parameters(tiny("llama")).items()
    }
    with pytest.raises(vauban.InputError, match="mlp of block 2 has no residual writer"):
        vauban.cut(weights, mx.ones(64), [2])


@pytest.mark.parametrize("name", ["mimo_v2_flash", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("only_writers", [True, False])
def test_packed_writers_are_read_rightly_or_refused(name: str, only_writers: bool) -> None:
    """Beside a float sibling nothing says how a writer is packed."""
    model = build(name)
    writers = {w.path for w in vauban.residual_writers(model) if w.layer >= 0}

    def packs(path: str, module: Any) -> bool:
        fits = hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
        return fits and (path in writers or not only_writers)

    nn.quantize(model, group_size=32, bits=4, class_predicate=packs)
    d, weights = direction(model), flat_parameters(model)
    if only_writers or name != "qwen3_moe":
        with pytest.raises(vauban.InputError, match="plan_cut"):
            vauban.cut(weights, d, "all")
        return
    done = vauban.cut(weights, d, "all")
    vauban.plan_cut(model, d, embedding=False).apply(model, "float")
    after = flat_parameters(model)
    assert done.keys() == after.keys()
    for key, value in after.items():
        assert np.allclose(np.array(value), np.array(done[key]), atol=1e-4), key
