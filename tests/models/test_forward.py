"""The forward pass against mlx-lm's own, on real model classes."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import vauban
from tests.conftest import TINY, random_tokens
from vauban.interventions import Ablate, Add
from vauban.models.taps import Stream, tapped

FAMILIES = sorted(TINY)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_the_models_own(tiny: Any, name: str) -> None:
    model = tiny(name)
    tokens = random_tokens(2, 19)
    out = vauban.forward(model, tokens)
    assert mx.abs(out.logits - model(tokens)).max().item() <= 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_residuals_equal_what_the_blocks_read(tiny: Any, name: str) -> None:
    """Manual capture equals the tap's, and the head of residual L gives the logits."""
    model = tiny(name)
    tokens = random_tokens(1, 17)
    out = vauban.forward(model, tokens, positions="all")
    stream = Stream(recording=True)
    with tapped(model, (), stream=stream):
        model(tokens)
    assert out.residual.shape == (1, len(model.layers) + 1, 17, 64)
    for r, h in enumerate(stream.residuals):
        assert mx.abs(out.residual[:, r] - h).max().item() <= 1e-4, r


def test_residual_zero_is_the_embedding(tiny: Any) -> None:
    model = tiny("llama")
    tokens = random_tokens(1, 5)
    out = vauban.forward(model, tokens, positions="all")
    assert mx.array_equal(out.residual[0, 0], model.model.embed_tokens(tokens)[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_right_padding_equals_single_prompts(tiny: Any, name: str) -> None:
    model = tiny(name)
    rows = [random_tokens(1, n, seed=n)[0].tolist() for n in (19, 4, 11)]
    padded = mx.array([r + [0] * (19 - len(r)) for r in rows])
    out = vauban.forward(model, padded, lengths=[19, 4, 11], positions=(-2, -1), logits="last")
    for i, row in enumerate(rows):
        single = vauban.forward(model, mx.array([row]), positions=(-2, -1), logits="last")
        scale = float(mx.abs(single.residual).max())
        assert mx.abs(out.residual[i] - single.residual[0]).max().item() <= 1e-4 * scale
        assert mx.abs(out.logits[i] - single.logits[0]).max().item() <= 1e-4 * scale


def test_half_precision_and_packed_models_agree_with_their_own_forward(tiny: Any) -> None:
    for bits in (4, 8):
        model = tiny("llama")
        import mlx.nn as nn

        nn.quantize(model, group_size=32, bits=bits)
        check = vauban.verify_forward(model)
        assert check.ok and check.max_difference <= 1e-4


def test_addition_moves_the_mean_by_exactly_k_raw_differences(tiny: Any) -> None:
    """API indices: what is added at residual r is seen at residual r, in every row."""
    model = tiny("llama")
    tokens = random_tokens(6, 9)
    plain = vauban.forward(model, tokens).residual[:, :, 0]
    raw = plain[:3, 2].mean(0) - plain[3:, 2].mean(0)
    moved = vauban.forward(model, tokens, interventions=[Add(raw, 1.5, 2)]).residual[:, :, 0]
    assert np.allclose(moved[:, 2].mean(0), plain[:, 2].mean(0) + 1.5 * raw, atol=1e-5)
    assert mx.array_equal(moved[:, :2], plain[:, :2])
    assert mx.abs(moved[:, 3] - plain[:, 3]).max().item() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_ablation_empties_every_residual_after_the_first_block(tiny: Any, name: str) -> None:
    model = tiny(name)
    d = mx.random.normal((64,), key=mx.random.key(3))
    out = vauban.forward(
        model, random_tokens(2, 13), positions="all", interventions=[Ablate(d)], logits=False
    )
    share = mx.abs(out.residual @ (d / mx.linalg.norm(d))) / mx.linalg.norm(out.residual, axis=-1)
    assert share.max().item() <= 1e-5


def test_interventions_leave_no_trace(tiny: Any) -> None:
    model = tiny("gemma2")
    tokens = random_tokens(1, 9)
    before = model(tokens)
    classes = [type(m) for _, m in model.named_modules()]
    vauban.forward(model, tokens, interventions=[Ablate(mx.ones(64))])
    with pytest.raises(RuntimeError), tapped(model, [Ablate(mx.ones(64))]):
        raise RuntimeError
    assert [type(m) for _, m in model.named_modules()] == classes
    assert mx.array_equal(model(tokens), before)


def test_a_block_that_changes_its_meaning_is_not_trusted(tiny: Any) -> None:
    """A family with the textbook signature but another trunk goes to the tap, never silently."""
    model = tiny("llama")
    trunk = type(model.model)

    class Scaled(trunk):
        def __call__(self, *args: Any, **more: Any) -> mx.array:
            return 3.0 * trunk.__call__(self, *args, **more)

    model.model.__class__ = Scaled
    check = vauban.verify_forward(model)
    assert check.path == "tap" and "manual differs" in check.note
    tokens = random_tokens(1, 6)
    assert mx.allclose(vauban.forward(model, tokens).logits, model(tokens), atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"tokens": mx.array([[1, 160]])}, "vocabulary holds 0 to 159"),
        ({"tokens": mx.zeros((1, 0), mx.int32)}, "not empty"),
        ({"tokens": mx.array([1, 2])}, "expected (batch, length)"),
        ({"tokens": mx.array([[1, 2]]), "lengths": [2, 2]}, "2 lengths for 1 rows"),
        ({"tokens": mx.array([[1, 2]]), "lengths": [3]}, "expected 1 to 2"),
        ({"tokens": mx.array([[1, 2]]), "positions": (-3,)}, "before the first token"),
        ({"tokens": mx.array([[1, 2]]), "positions": (0,)}, "negative ints"),
    ],
)
def test_bad_input_is_named(tiny: Any, call: dict[str, Any], message: str) -> None:
    with pytest.raises(vauban.InputError) as error:
        vauban.forward(tiny("llama"), call.pop("tokens"), **call)
    assert message in str(error.value)


def test_nan_weights_are_refused(tiny: Any) -> None:
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight = mx.full((96, 64), float("nan"))
    with pytest.raises(vauban.ArchitectureError, match="NaN"):
        vauban.verify_forward(model)
