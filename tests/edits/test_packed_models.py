"""Packed checkpoints of several families: every edited module against naive requantization."""

import importlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

import vauban
from vauban.edits.blocks import edited_rows, matrices
from vauban.edits.modules import module_weight, unpack
from vauban.edits.packed import pack_edited

_COMMON = {
    "hidden_size": 1024, "num_hidden_layers": 2, "intermediate_size": 1536,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "rms_norm_eps": 1e-5,
    "vocab_size": 320, "max_position_embeddings": 512, "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3_moe": {
        "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 512,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    },
    "gemma3_text": {
        "sliding_window": 64, "sliding_window_pattern": 2, "query_pre_attn_scalar": 64,
    },
}  # fmt: skip


def packed_model(name: str, bits: int, gaussian: bool = True) -> nn.Module:
    code = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(0)
    model = code.Model(code.ModelArgs.from_dict({**_COMMON, **FAMILIES[name], "model_type": name}))
    if gaussian:
        # As trained weights nearly are; mlx's default is uniform, whose packed range is full.
        model.update(
            tree_map(
                lambda p: 0.02 * mx.random.normal(p.shape) if p.ndim > 1 else p, model.parameters()
            )
        )
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=64, bits=bits)
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("gaussian", [True, False])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_writer_is_exact_and_near_plain_rounding(name: str, gaussian: bool) -> None:
    """Left <= 0.1 %, leak <= 0.15, error <= 1.35 times naive requantization's, by module."""
    model = packed_model(name, 4, gaussian)
    d = mx.random.normal((1024,), key=mx.random.key(0))
    assert 1 / float(((d / mx.linalg.norm(d)) ** 4).sum()) >= 64
    modules = dict(model.named_modules())
    for update in vauban.plan_cut(model, d).updates:
        module = modules[update.path]
        found = pack_edited(module, update)
        assert found.left <= 1e-3 and found.bits == 4, update.path
        before = module_weight(module)
        target = update.weight(before)
        naive = mx.quantize(target.astype(mx.bfloat16), group_size=64, bits=4)
        stored = unpack(*naive, 64, 4, "affine")
        error = float(mx.linalg.norm(stored - target) / mx.linalg.norm(target))
        # A uniform matrix fills its packed range: there is less room to move its codes.
        assert found.error <= (1.35 if gaussian else 1.45) * error, update.path
        assert found.leak <= 0.15, update.path
        assert update.share_left(stored, before) > 100 * found.left


def test_reading_in_blocks_is_reading_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, float rows and packed arrays do not depend on the size of the blocks."""
    from vauban.edits import blocks

    results = []
    for size in (1 << 22, 5000):
        monkeypatch.setattr(blocks, "BLOCK", size)
        model = packed_model("qwen3_moe", 4)
        d = mx.random.normal((1024,), key=mx.random.key(1))
        modules = dict(model.named_modules())
        for update in vauban.plan_cut(model, d).updates[:3]:
            module = modules[update.path]
            whole = module_weight(module)
            rows = mx.concatenate(list(edited_rows(module, update)))
            assert np.allclose(
                rows.reshape(whole.shape).astype(mx.float32),
                update.weight(whole).astype(mx.bfloat16).astype(mx.float32),
                atol=8e-3 * float(mx.abs(whole).max()),
            )
            results.append((update.path, size, pack_edited(module, update)))
            assert sum(s.shape[0] for s in matrices(module)) == np.prod(whole.shape[:-1])
    half = len(results) // 2
    for (path, _, a), (_, _, b) in zip(results[:half], results[half:], strict=True):
        for part in a.arrays:
            # Sums over other blocks differ in their last bits, which may tip a code at a tie.
            differ = float(mx.mean(a.arrays[part] != b.arrays[part]))
            assert differ <= 1e-2, (path, part)
        assert np.isclose(a.error, b.error, rtol=1e-3) and np.isclose(a.had, b.had, rtol=1e-3)


def test_a_packed_model_is_applied_and_exported_alike(tmp_path: Path) -> None:
    """In memory and on disk the same codes."""
    model = packed_model("llama", 4)
    d = mx.random.normal((1024,), key=mx.random.key(2))
    plan = vauban.plan_cut(model, d)
    path = plan.updates[-1].path
    module = dict(model.named_modules())[path]
    expected = pack_edited(module, plan.updates[-1])
    plan.apply(model)
    edited = dict(model.named_modules())[path]
    assert mx.array_equal(edited.weight, expected.arrays["weight"])
    assert type(edited) is type(module) and (edited.bits, edited.group_size) == (4, 64)


def test_packings_that_would_be_read_wrongly_are_refused() -> None:
    """A scale of its own beside the packed experts: reading without it would be silently wrong."""
    module = packed_model("llama", 4).model.layers[0].mlp.down_proj
    module.global_scale = mx.ones((1,))
    with pytest.raises(vauban.InputError, match="global scale"):
        module_weight(module)
    with pytest.raises(vauban.InputError, match="global scale"):
        matrices(module)
