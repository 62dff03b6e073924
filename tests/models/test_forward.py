"""The forward pass against mlx-lm's own, on real model classes."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

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


def retrunked(model: Any, call: Any) -> Any:
    """The model with another trunk forward, as an unknown family would have it."""
    trunk = type(model.model)
    model.model.__class__ = type("Other", (trunk,), {"__call__": call})
    return model


def test_what_a_family_does_around_its_blocks_is_walked(tiny: Any) -> None:
    """A scaled embedding, a doubled norm: the loop takes them from the model's own code."""
    model = tiny("llama")
    trunk = type(model.model)

    def call(self: Any, *args: Any, **more: Any) -> mx.array:
        return 3.0 * trunk.__call__(self, *args, **more)

    check = vauban.verify_forward(retrunked(model, call))
    assert check.path == "manual" and check.max_difference == 0.0


def test_a_trunk_that_works_between_its_blocks_goes_to_the_tap(tiny: Any) -> None:
    """Never silently wrong: what the loop would miss is found, said, and recorded as it is."""

    def call(self: Any, tokens: mx.array, cache: Any = None, *more: Any) -> mx.array:
        h = self.embed_tokens(tokens)
        for layer, state in zip(self.layers, cache, strict=True):
            h = 1.5 * layer(h, "causal", state)
        return self.norm(h)

    model = retrunked(tiny("llama"), call)
    check = vauban.verify_forward(model)
    assert check.path == "tap" and "changes the stream" in check.note
    tokens = random_tokens(1, 6)
    out = vauban.forward(model, tokens, positions="all")
    assert mx.allclose(out.logits, model(tokens, cache=make_prompt_cache(model)), atol=1e-5)
    h = model.model.embed_tokens(tokens)
    for r, layer in enumerate(model.model.layers):
        assert mx.allclose(out.residual[:, r], h, atol=1e-4)
        h = 1.5 * layer(h, "causal")


def test_the_stream_is_found_where_it_is_not_the_first_argument(tiny: Any) -> None:
    model = tiny("llama")
    block = type(model.model.layers[0])

    class Second(block):
        def __call__(self, first: mx.array, h: mx.array, mask: Any, cache: Any) -> mx.array:
            return block.__call__(self, h, mask, cache) + 0.1 * first

    for layer in model.model.layers:
        layer.__class__ = Second

    def call(self: Any, tokens: mx.array, cache: Any = None, *more: Any) -> mx.array:
        first = h = self.embed_tokens(tokens)
        for layer, state in zip(self.layers, cache, strict=True):
            h = layer(first, h, "causal", state)
        return self.norm(h)

    retrunked(model, call)
    assert vauban.verify_forward(model).path == "manual"
    tokens = random_tokens(1, 6)
    out = vauban.forward(model, tokens, positions="all")
    assert mx.abs(out.residual[:, 2] - out.residual[:, 0]).max().item() > 1e-2


def test_no_path_is_an_error(tiny: Any) -> None:
    """Blocks that are not called as modules, on a trunk the loop cannot walk either."""

    def call(self: Any, tokens: mx.array, cache: Any = None, *more: Any) -> mx.array:
        h = self.embed_tokens(tokens)
        for layer in self.layers:
            h = h + layer.mlp(layer.post_attention_layernorm(h))
        return self.norm(h)

    with pytest.raises(vauban.ArchitectureError, match="no forward pass of vauban"):
        vauban.verify_forward(retrunked(tiny("llama"), call))


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
