"""What the tiny families do not show by themselves: packed weights, wrong caches, bad modules."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map
from mlx_lm.models.cache import KVCache, make_prompt_cache

import vauban
from tests.architectures.build import build
from tests.architectures.expected import PACKED
from tests.architectures.measure import difference, model_of
from tests.conftest import random_tokens
from vauban.interventions import Add
from vauban.models import residual_writers, walk
from vauban.models.module_probe import compare_with_probe, probe_writers
from vauban.models.notes import note
from vauban.models.taps import tapped


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", PACKED)
def test_packed_models_agree_with_their_own_forward(name: str, bits: int) -> None:
    model = build(name)

    def fits(path: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0

    nn.quantize(model, group_size=32, bits=bits, class_predicate=fits)
    assert any(w.quantization for w in residual_writers(model))
    check = vauban.verify_forward(model)
    assert check.path == "manual"
    tokens = random_tokens(1, 23, seed=4)
    out = vauban.forward(model, tokens, positions="all")
    assert difference(out.logits, model(tokens, cache=make_prompt_cache(model))) <= 1e-5


def test_half_precision_agrees_with_its_own_forward() -> None:
    model = build("gemma3_text")
    model.update(tree_map(lambda p: p.astype(mx.bfloat16), model.parameters()))
    tokens = random_tokens(1, 23, seed=4)
    out = vauban.forward(model, tokens, positions="all")
    assert difference(out.logits, model(tokens, cache=make_prompt_cache(model))) <= 1e-5


def test_a_cache_of_another_model_is_named() -> None:
    llama, gemma = model_of("llama"), model_of("gemma3_text")
    tokens = mx.array([[1, 2, 3]])
    with pytest.raises(vauban.InputError, match="6 entries, llama needs 4"):
        vauban.forward(llama, tokens, cache=make_prompt_cache(gemma))
    mamba = [KVCache() for _ in range(4)]
    with pytest.raises(vauban.InputError, match="cache 0 is a KVCache, mamba needs a ArraysCache"):
        vauban.forward(model_of("mamba"), tokens, cache=mamba)
    filled = make_prompt_cache(llama)
    llama(mx.array([[5, 6], [7, 8]]), cache=filled)
    with pytest.raises(vauban.InputError, match="holds 2 rows, the tokens have 1"):
        vauban.forward(llama, tokens, cache=filled)


def test_rows_that_may_not_be_padded_run_by_length() -> None:
    """Phi-3 small reads padded rows wrongly: every row still equals its single prompt."""
    model = model_of("phi3small")
    rows = [random_tokens(1, n, seed=n)[0].tolist() for n in (9, 5, 9)]
    padded = mx.array([r + [0] * (9 - len(r)) for r in rows])
    out = vauban.forward(model, padded, lengths=[9, 5, 9], positions="all", logits=False)
    for i, row in enumerate(rows):
        single = vauban.forward(model, mx.array([row]), positions="all", logits=False)
        assert difference(out.residual[i, :, : len(row)], single.residual[0]) <= 1e-5
    assert not out.residual[1, :, 5:].any()
    with pytest.raises(vauban.ArchitectureError, match="rows of one length"):
        vauban.forward(
            model, padded, lengths=[9, 5, 9], cache=make_prompt_cache(model), logits=False
        )


def test_several_streams_in_both_forms() -> None:
    """Gemma 3n carries four streams; "read" is what the next norm reads."""
    model = model_of("gemma3n")
    tokens = random_tokens(2, 7)
    streams = vauban.forward(model, tokens, positions=(-1,), streams="all").residual
    read = vauban.forward(model, tokens, positions=(-1,), logits="last").residual
    assert streams.shape == (2, 5, 1, 4, 64) and read.shape == (2, 5, 1, 64)
    assert mx.isfinite(streams).all() and mx.isfinite(read).all()


def test_blocks_that_are_never_called_refuse_a_change_between_them() -> None:
    model = model_of("iquestloopcoder")
    vauban.verify_forward(model)
    with (
        pytest.raises(vauban.ArchitectureError, match="never calls its blocks"),
        tapped(model, [Add(mx.ones(64), 1.0, 1)]),
    ):
        pass


@pytest.mark.parametrize("name", ["afm7", "iquestloopcoder", "nanbeige", "gptj", "plamo"])
def test_additions_reach_the_residual_where_a_family_has_its_own_loop(name: str) -> None:
    model = model_of(name)
    tokens = random_tokens(1, 9)
    step = mx.random.normal((64,), key=mx.random.key(7))
    plain = vauban.forward(model, tokens, positions="all").residual
    moved = vauban.forward(model, tokens, positions="all", interventions=[Add(step, 1.0, 3)])
    last = plain.shape[1] - 2
    if name in ("afm7", "gptj", "plamo"):
        # One round over the blocks: what comes before is untouched.
        assert mx.array_equal(moved.residual[:, :3], plain[:, :3])
        assert mx.allclose(moved.residual[:, 3], plain[:, 3] + step, atol=1e-5)
    assert mx.abs(moved.residual[:, last + 1] - plain[:, last + 1]).max().item() > 1e-2


def test_evaluation_in_groups_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models too large for one command are evaluated every few blocks."""
    model = build("llama")
    tokens = random_tokens(1, 9)
    whole = vauban.forward(model, tokens, positions="all")
    size = sum(p.nbytes for p in tree_leaves(model))
    monkeypatch.setattr(walk, "_BYTES_AT_ONCE", size // 4 + 1)
    note(model, stride=None)
    evaluated: list[mx.array] = []
    monkeypatch.setattr(walk, "evaluate", lambda h: evaluated.append(h) or mx.eval(h))
    grouped = vauban.forward(model, tokens, positions="all")
    assert len(evaluated) == 5
    assert mx.array_equal(whole.residual, grouped.residual)


def tree_leaves(model: nn.Module) -> list[mx.array]:
    from mlx.utils import tree_flatten

    return [p for _, p in tree_flatten(model.parameters())]


def test_an_unfused_adapter_is_an_error() -> None:
    from mlx_lm.tuner.lora import LoRALinear

    model = build("llama")
    attention = model.model.layers[1].self_attn
    attention.o_proj = LoRALinear.from_base(attention.o_proj, r=2)
    with pytest.raises(vauban.ArchitectureError, match="fuse it first"):
        residual_writers(model)


def test_a_matrix_in_an_unknown_form_is_an_error() -> None:
    class Strange(nn.Module):
        def __init__(self, weight: mx.array) -> None:
            super().__init__()
            self.weight = weight

    model = build("llama")
    mlp = model.model.layers[2].mlp
    mlp.down_proj = Strange(mlp.down_proj.weight)
    with pytest.raises(vauban.ArchitectureError, match="is a Strange"):
        residual_writers(model)


def test_the_probe_sees_what_a_name_hides() -> None:
    """A writer under another name is missed by the rule and found by the probe, and the reverse."""
    model = build("llama")
    layer = model.model.layers[1]
    block = type(layer)
    layer.side = nn.Linear(64, 64)
    layer.mlp.dense = nn.Linear(64, 64)

    class WithSide(block):  # type: ignore[misc, valid-type]
        def __call__(self, h: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            self.mlp.dense(h)
            return block.__call__(self, h, *args, **kwargs) + self.side(h)

    layer.__class__ = WithSide
    report = compare_with_probe(model)
    assert report.missed == ("model.layers.1.side",)
    assert report.invented == ("model.layers.1.mlp.dense",)
    assert not report.ok


def test_the_probe_measures_gains() -> None:
    model = build("gemma2")
    layer = model.model.layers[0]
    probed = {p.path: p.gain for p in probe_writers(model)}
    expected = 1.0 + layer.post_attention_layernorm.weight
    found = probed["model.layers.0.self_attn.o_proj"]
    ratio = found / expected
    assert mx.allclose(ratio, ratio[0], rtol=1e-3)
