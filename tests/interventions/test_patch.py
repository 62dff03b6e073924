"""Activation patching: by hand, in batches, behind a common prefix, and between two prompts."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.base import create_attention_mask

import vauban
from tests.conftest import build, random_tokens
from vauban.generation import generate_tokens
from vauban.interventions import Add, Conditional, Patch

VECTORS = 3 * mx.random.normal((2, 64), key=mx.random.key(4))


def by_hand(model: nn.Module, tokens: mx.array, layer: int, columns: list[int]) -> mx.array:
    """Logits of a Llama whose stream is replaced before block `layer`, written out."""
    h = model.model.embed_tokens(tokens)
    mask = create_attention_mask(h, None)
    for index, block in enumerate(model.model.layers):
        if index == layer:
            rows = [VECTORS[columns.index(t)] if t in columns else h[0, t]
                    for t in range(h.shape[1])]  # fmt: skip
            h = mx.stack(rows)[None]
        h = block(h, mask)
    return model.lm_head(model.model.norm(h))


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_the_stream_is_replaced_where_it_is_named(layer: int) -> None:
    model, tokens = build("llama"), random_tokens(1, 9)
    change = Patch(VECTORS, layer, [1, -3])
    out = vauban.forward(model, tokens, positions="all", interventions=[change])
    expected = by_hand(model, tokens, layer, [1, 6])
    assert mx.abs(out.logits - expected).max().item() <= 1e-4 * float(mx.abs(expected).max())
    plain = vauban.forward(model, tokens, positions="all").residual
    assert np.allclose(out.residual[0, layer, [1, 6]], VECTORS, atol=1e-6)
    # Other tokens and earlier residuals are what they were.
    assert mx.array_equal(out.residual[0, :layer], plain[0, :layer])
    assert mx.array_equal(out.residual[0, layer, 2:6], plain[0, layer, 2:6])


def test_patching_a_whole_residual_gives_the_clean_answer() -> None:
    """All that block 2 onwards knows of a prompt is residual 2."""
    model = build("gemma2")
    clean, corrupted = random_tokens(1, 7, seed=1), random_tokens(1, 7, seed=2)
    wanted = vauban.forward(model, clean, positions="all")
    values = wanted.residual[0, 2]
    got = vauban.forward(model, corrupted, interventions=[Patch(values, 2, range(7))])
    assert mx.allclose(got.logits, wanted.logits, atol=1e-5)
    moved = vauban.forward(model, corrupted).logits - wanted.logits
    assert mx.abs(moved).max().item() > 1e-2


PROMPTS = [[7, 8, 9, *random_tokens(1, n, seed=n)[0].tolist()] for n in (4, 11, 6, 11)]


@pytest.mark.parametrize("positions", [(1, -2), (0, 4), (-6, -1)])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_batches_and_prefixes_equal_single_prompts(family: str, positions: tuple[int, int]) -> None:
    """Inside the common prefix of three tokens, behind it, and counted from either end."""
    model = build(family)
    change = Patch(VECTORS, 2, positions)

    def answers(lists: list[list[int]], *changes: Any) -> list[list[int]]:
        return generate_tokens(model, lists, eos=frozenset(), max_tokens=5, interventions=changes)

    single = [answers([prompt], change)[0] for prompt in PROMPTS]
    assert answers(PROMPTS, change) == single
    assert answers(PROMPTS) != single
    padded = mx.array([p + [0] * (14 - len(p)) for p in PROMPTS])
    together = vauban.forward(
        model, padded, lengths=[len(p) for p in PROMPTS], interventions=[change]
    ).residual
    for row, prompt in enumerate(PROMPTS):
        alone = vauban.forward(model, mx.array([prompt]), interventions=[change]).residual
        assert mx.abs(together[row] - alone[0]).max().item() <= 1e-4


def test_decoded_tokens_are_left_alone() -> None:
    """By hand: the prompt's logits are patched ones, after that the cache decides."""
    model, prompt = build("llama"), PROMPTS[0]
    change = Patch(VECTORS[0], 4, -1)
    got = generate_tokens(model, [prompt], eos=frozenset(), max_tokens=4, interventions=[change])[0]
    first = vauban.unembed(model, VECTORS[:1])
    # Residual 4 is the last: keys and values are those of the plain prompt.
    assert got[0] == int(mx.argmax(first[0]))
    plain = vauban.forward(model, mx.array([[*prompt, *got[:-1]]])).logits[0]
    assert got[1:] == [int(t) for t in mx.argmax(plain[len(prompt) :], axis=-1)]


def test_collection_and_conditions_take_patches(organism: Any) -> None:
    model, tokenizer = organism
    prompts = ["Name a river.", "What is hot, and what is cold?", "Hello"]
    vector = mx.random.normal((128,), key=mx.random.key(1))
    change = Patch(vector, 3, -2)
    found = vauban.collect_activations(
        model, tokenizer, prompts, positions=(-2, -1), interventions=[change]
    )
    assert np.allclose(found.at(3, -2), mx.broadcast_to(vector, (3, 128)), atol=1e-5)
    always = Conditional(vector, -1.0, change, layer=1)
    switched = vauban.collect_activations(
        model, tokenizer, prompts, positions=(-2, -1), interventions=[always]
    )
    assert np.allclose(found.values, switched.values, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Patch(VECTORS, 2, []), "positions is empty"),
        (lambda: Patch(VECTORS, 2, "last"), "positions is 'last'"),
        (lambda: Patch(VECTORS, 2, [0, 1, 2]), "2 vectors for 3 positions"),
        (lambda: Patch(VECTORS, "all", 0), "one residual index"),
        (lambda: Patch(VECTORS * float("nan"), 2, [0, 1]), "NaN or inf"),
        (lambda: Patch(VECTORS, 2, [0, 1]).change("block_input", 2, 4, True), "whole prompts"),
        (lambda: Patch(VECTORS, 2, [3, -9]).start([9, 4]), "position -9 lies beyond row 1"),
        (lambda: Patch(VECTORS, 2, [3, 4]).start([9, 4]), "position 4 lies beyond row 1"),
        (lambda: Patch(VECTORS, 2, [3, -2]).start([9, 5]), "a token of row 1 twice"),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(vauban.InputError, match=message):
        make()


def test_a_patch_is_refused_where_tokens_cannot_be_told_apart() -> None:
    """Gemma 3n carries four streams: a token's place in them is no single vector."""
    from tests.architectures.measure import model_of

    with pytest.raises(vauban.InputError, match="the stream has shape"):
        vauban.forward(model_of("gemma3n"), random_tokens(1, 5), interventions=[
            Patch(VECTORS[0], 2, 0)
        ])  # fmt: skip
    with pytest.raises(vauban.InputError, match="the stream has shape"):
        vauban.forward(model_of("gemma3n"), random_tokens(1, 5), interventions=[
            Conditional(VECTORS[0], 0.0, Add(VECTORS[0], 1.0, 2), layer=1)
        ])  # fmt: skip
