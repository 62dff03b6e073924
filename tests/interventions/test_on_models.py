"""Interventions on real mlx-lm models: equal to edited weights, prefill equal to decoding."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import vauban
from tests.conftest import build, random_tokens
from vauban.generation import generate_tokens
from vauban.interventions import Ablate, AblateTo, Add, Conditional, Erase, Flip, Project

D = mx.random.normal((64,), key=mx.random.key(3))
BASIS = mx.random.normal((2, 64), key=mx.random.key(4))


def relative(a: mx.array, b: mx.array) -> float:
    return float(mx.abs(a - b).max() / mx.abs(b).max())


def baked(name: str, basis: mx.array, alpha: float) -> nn.Module:
    """The model with W <- P_α W, b <- P_α b at every writer, written out by hand."""
    model = build(name)
    q = np.linalg.qr(np.atleast_2d(np.array(basis, dtype=np.float64)).T)[0]
    P = mx.array((np.eye(64) - alpha * q @ q.T).astype(np.float32))
    embedding = model.model.embed_tokens
    embedding.weight = embedding.weight @ P
    for layer in model.model.layers:
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight = P @ writer.weight
            if "bias" in writer:
                writer.bias = P @ writer.bias
    return model


@pytest.mark.parametrize("name", ["llama", "llama_bias"])
@pytest.mark.parametrize("basis", [D, BASIS])
def test_projection_of_all_layers_is_the_weights(name: str, basis: mx.array) -> None:
    """W <- P_α W on the embedding and all writers, for erasure, half of it and reflection."""
    model, tokens = build(name), random_tokens(2, 9)
    plain = vauban.forward(model, tokens).logits
    for alpha in (0.5, 1.0, 2.0):
        expected = baked(name, basis, alpha)(tokens)
        got = vauban.forward(model, tokens, interventions=[Project(basis, alpha)]).logits
        assert relative(got, expected) <= 1e-4 < 1e-2 < relative(plain, expected)
    flipped = vauban.forward(model, tokens, interventions=[Flip(basis)]).logits
    assert relative(flipped, baked(name, basis, 2.0)(tokens)) <= 1e-4
    ablated = vauban.forward(model, tokens, interventions=[Ablate(basis)]).logits
    assert relative(ablated, baked(name, basis, 1.0)(tokens)) <= 1e-4


def test_a_flip_named_twice_is_one_flip() -> None:
    """Selected twice, a layer has been reflected twice in the study: that is no change at all."""
    model, tokens = build("llama"), random_tokens(2, 9)

    def logits(*changes: Any) -> mx.array:
        return vauban.forward(model, tokens, interventions=changes).logits

    once = logits(Flip(D, layers=[2]))
    assert relative(logits(Flip(D, layers=[2, 2])), once) == 0.0
    assert relative(logits(), once) > 1e-3
    assert relative(logits(Flip(D, layers=[2]), Flip(D, layers=[2])), logits()) <= 1e-4


def test_an_affine_flip_mirrors_its_residual_about_the_midpoint() -> None:
    """Along D, and nothing else; residuals before it stay."""
    model, tokens = build("llama"), random_tokens(2, 9)
    points = {r: mx.random.normal((64,), key=mx.random.key(r)) for r in range(4)}
    unit = D / mx.linalg.norm(D)
    one = vauban.forward(model, tokens, interventions=[Flip(D, points, layers=[1])]).residual
    base = vauban.forward(model, tokens).residual
    mirrored = 2 * (points[1] @ unit) - base[:, 1] @ unit
    assert np.allclose(one[:, 1] @ unit, mirrored, atol=1e-4)
    assert np.allclose(one[:, 0], base[:, 0], atol=1e-6)
    assert np.allclose(
        one[:, 1] - (one[:, 1] @ unit)[..., None] * unit,
        base[:, 1] - (base[:, 1] @ unit)[..., None] * unit,
        atol=1e-4,
    )


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_streams_end_where_they_are_sent(bits: int | None) -> None:
    """Float and quantized models: values, erasers and projections hold at every residual."""
    model, tokens = build("llama"), random_tokens(3, 9)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    unit = D / mx.linalg.norm(D)
    to = AblateTo(D, {r: float(r) for r in range(5)})
    residual = vauban.forward(model, tokens, positions="all", interventions=[to]).residual
    wanted = mx.arange(5).reshape(1, 5, 1)
    assert float(mx.abs(residual @ unit - wanted).max()) <= 1e-4

    X = mx.random.normal((30, 64), key=mx.random.key(8))
    eraser = vauban.fit_leace(X + (mx.arange(30) % 2)[:, None] * D, mx.arange(30) % 2)
    erased = vauban.forward(
        model, tokens, positions="all", interventions=[Erase(eraser, "all")]
    ).residual
    left = (erased - eraser.mean) @ eraser.right.T
    plain = vauban.forward(model, tokens, positions="all").residual
    assert float(mx.abs(left).max()) <= 1e-4 * float(
        mx.abs((plain - eraser.mean) @ eraser.right.T).max()
    )
    gone = vauban.forward(model, tokens, positions="all", interventions=[Ablate(D)]).residual
    assert float(mx.abs(gone @ unit).max()) <= 1e-4


def by_full_passes(model: nn.Module, prompt: list[int], change: Any, steps: int) -> list[int]:
    """Greedy answer that reads prompt and answer anew for every token, without a cache."""
    ids = list(prompt)
    for _ in range(steps):
        logits = vauban.forward(model, mx.array([ids]), interventions=[change]).logits
        ids.append(int(mx.argmax(logits[0, -1])))
    return ids[len(prompt) :]


X = mx.random.normal((30, 64), key=mx.random.key(8))
CHANGES = {
    "ablate": Ablate(D),
    "project": Project(BASIS, 2.0, layers=[1, 2]),
    "flip": Flip(D, midpoint=BASIS[0]),
    "add": Add(D, 0.7, 2),
    "ablate_to": AblateTo(D, 3.0),
    "erase": Erase(vauban.fit_leace(X, mx.arange(30) % 2), [1, 3]),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_cached_decoding_equals_full_passes(name: str, family: str) -> None:
    """In a batch of uneven prompts with a common prefix, on pre-norm, post-norm and MoE blocks."""
    model = build(family)
    prompts = [random_tokens(1, n, seed=n)[0].tolist() for n in (5, 11, 8)]
    prompts = [[7, 8, 9, *p] for p in prompts]
    change = CHANGES[name]
    got = generate_tokens(model, prompts, eos=frozenset(), max_tokens=6, interventions=[change])
    assert got == [by_full_passes(model, p, change, 6) for p in prompts]
    assert got != generate_tokens(model, prompts, eos=frozenset(), max_tokens=6)


def test_an_addition_to_the_prompt_alone_stops_there() -> None:
    model = build("llama")
    prompt = random_tokens(1, 7)[0].tolist()
    both = [
        generate_tokens(
            model, [prompt], eos=frozenset(), max_tokens=8, interventions=[Add(9 * D, 1.0, 2, p)]
        )[0]
        for p in ("prompt", "all")
    ]
    # The first token comes from the same prefill, the later ones do not.
    assert both[0][0] == both[1][0] and both[0] != both[1]


def cosines(model: nn.Module, prompts: list[list[int]], layer: int) -> list[float]:
    """One prompt at a time, without padding."""
    unit, found = D / mx.linalg.norm(D), []
    for prompt in prompts:
        mean = vauban.forward(model, mx.array([prompt]), positions="all").residual[0, layer].mean(0)
        found.append(float(mean @ unit / mx.linalg.norm(mean)))
    return found


@pytest.mark.parametrize("above", [True, False])
def test_conditions_are_decided_per_row_and_kept(above: bool) -> None:
    """Rows that meet the condition answer as under the change, the others as without it."""
    model = build("llama")
    prompts = [random_tokens(1, n, seed=n)[0].tolist() for n in (4, 9, 13, 6, 11, 7)]
    prompts = [[7, 8, 9, *p] for p in prompts]
    inner = AblateTo(D, 3.0, layers=[2, 3, 4])
    values = cosines(model, prompts, 2)
    order = sorted(values)
    threshold = (order[2] + order[3]) / 2
    change = Conditional(D, threshold, inner, layer=2, above=above)
    met = [(v > threshold) == above for v in values]

    def answers(lists: list[list[int]], *changes: Any, eos: frozenset[int] = frozenset()) -> Any:
        return generate_tokens(model, lists, eos=eos, max_tokens=8, interventions=changes)

    plain, changed = answers(prompts), answers(prompts, inner)
    got = answers(prompts, change)
    assert sum(met) == 3 and all(a != b for a, b in zip(plain, changed, strict=True))
    assert got == [b if m else a for a, b, m in zip(plain, changed, met, strict=True)]
    # Rows that end early leave the batch; the others keep their decisions.
    eos = frozenset({got[0][1], got[2][2], got[4][3]})

    def cut(answer: list[int]) -> list[int]:
        ends = [i for i, token in enumerate(answer) if token in eos]
        return answer[: ends[0]] if ends else answer

    assert answers(prompts, change, eos=eos) == [cut(answer) for answer in got]
    # One by one the same: padding and neighbours do not matter.
    assert [answers([p], change)[0] for p in prompts] == got


def test_conditions_in_one_pass_and_in_collection() -> None:
    model = build("llama")
    prompts = [random_tokens(1, n, seed=n)[0].tolist() for n in (4, 9, 6)]
    values = cosines(model, prompts, 1)
    threshold = sorted(values)[1] - 1e-4
    change = Conditional(D, threshold, Ablate(D, layers=[1, 2]), layer=1)
    padded = mx.array([p + [0] * (9 - len(p)) for p in prompts])
    found = [
        vauban.forward(model, padded, lengths=[4, 9, 6], interventions=i).residual
        for i in ([], [Ablate(D, layers=[1, 2])], [change])
    ]
    for row, value in enumerate(values):
        expected = found[1 if value > threshold else 0][row]
        assert np.allclose(found[2][row], expected, atol=1e-5)
    assert sum(v > threshold for v in values) == 2


def test_a_condition_on_whole_prompts_is_not_decided_by_their_prefix(
    organism: Any, organism_prompts: Any, measured: Any
) -> None:
    """Chat templates share a prefix, which is read once; a condition has to see all of it."""
    model, tokenizer = organism
    prompts = organism_prompts["harmful"][:3] + organism_prompts["harmless"][:3]
    inner = AblateTo.from_result(measured)
    values = []
    for prompt in prompts:
        tokens = mx.array([vauban.encode_chat(tokenizer, prompt)])
        mean = vauban.forward(model, tokens, positions="all").residual[0, 2].mean(0)
        values.append(float(mean @ measured.direction / mx.linalg.norm(mean)))
    threshold = float(np.median(values))
    change = Conditional(measured.direction, threshold, inner, layer=2)
    plain, changed = (
        vauban.collect_activations(model, tokenizer, prompts, interventions=i).values[:, 3:]
        for i in ([], [change])
    )
    moved = np.array(mx.abs(plain - changed).max(axis=(1, 2, 3))) > 1e-3
    assert moved.tolist() == [v > threshold for v in values] and 0 < moved.sum() < 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Conditional(D, 1.5, Ablate(D), layer=1), "cosine lies in"),
        (lambda: Conditional(BASIS, 0.5, Ablate(D), layer=1), r"expected one, \(d,\)"),
        (lambda: Conditional(mx.zeros(64), 0.5, Ablate(D), layer=1), "is zero"),
        (lambda: Conditional(D, 0.5, Ablate(D), layer=-1), "negative"),
        (
            lambda: Conditional(D, 0.5, Conditional(D, 0.5, Ablate(D), layer=1), layer=1),
            "row by row",
        ),
        (
            lambda: vauban.forward(
                build("llama"),
                random_tokens(1, 4),
                interventions=[Conditional(D, 0.5, Ablate(D), layer=9)],
            ),
            "residuals 0 to 4",
        ),
        (
            lambda: Conditional(D, 0.5, Ablate(D), layer=1).change("block_input", 1, 4, True),
            "depends on whole prompts",
        ),
    ],
)
def test_bad_conditions(make: Any, message: str) -> None:
    with pytest.raises(vauban.InputError, match=message):
        make()
