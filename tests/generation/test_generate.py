"""Generation: batches, prefix reuse and interventions against one prompt at a time."""

from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache

import vauban
from tests.conftest import TINY, random_tokens
from vauban.generation import generate_groups, generate_tokens, shared_prefix
from vauban.generation.decoding import loop_of
from vauban.generation.uneven import uneven_batches
from vauban.interventions import Add, ModuleOutputs, ModuleWeights
from vauban.models.swap import around, swapped


def greedy(model: Any, tokens: list[int], count: int, eos: frozenset[int]) -> list[int]:
    """mlx-lm's own cached forward, one prompt, argmax."""
    cache = make_prompt_cache(model)
    logits = model(mx.array([tokens]), cache=cache)[:, -1]
    answer: list[int] = []
    while len(answer) < count:
        token = int(mx.argmax(logits[0]))
        if token in eos:
            break
        answer.append(token)
        logits = model(mx.array([[token]]), cache=cache)[:, -1]
    return answer


def prompts(prefix: int) -> list[list[int]]:
    head = random_tokens(1, max(prefix, 1), seed=9)[0].tolist()[:prefix]
    return [head + random_tokens(1, n, seed=n)[0].tolist() for n in (3, 9, 9, 5, 14)]


@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize("prefix", [0, 7])
def test_batched_answers_equal_single_ones(tiny: Any, name: str, prefix: int) -> None:
    model = tiny(name)
    lists = prompts(prefix)
    first = [greedy(model, t, 6, frozenset()) for t in lists]
    # An end token that some rows meet early and others never: rows leave the batch.
    eos = frozenset({first[1][2]})
    expected = [greedy(model, t, 6, eos) for t in lists]
    assert generate_tokens(model, lists, eos=eos, max_tokens=6) == expected
    assert generate_tokens(model, lists, eos=eos, max_tokens=6, batch_size=2) == expected


@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize("prefix", [0, 7])
def test_rows_under_different_changes_answer_as_alone(tiny: Any, name: str, prefix: int) -> None:
    """Stream sites, module outputs, prompt interventions and no change in one batch."""
    model = tiny(name)
    width = vauban.describe(model).d_model
    unit = mx.random.normal((width,), key=mx.random.key(3))
    unit /= mx.linalg.norm(unit)
    writers = [w.path for w in vauban.residual_writers(model) if w.path.endswith("_proj")]
    changes: list[list[Any]] = [
        [],
        [vauban.Ablate(unit)],
        [ModuleOutputs({path: (unit[None], 1.0) for path in writers[:2]})],
        [Add(400.0 * unit, 1.0, 1)],
        [vauban.Conditional(unit, 0.0, vauban.Ablate(unit), layer=1)],
    ]
    lists = prompts(prefix)
    groups = [(change, lists[: n + 1]) for n, change in enumerate(changes)]
    eos = frozenset({greedy(model, lists[1], 6, frozenset())[2]})
    expected = [
        generate_tokens(model, some, eos=eos, max_tokens=6, interventions=change)
        for change, some in groups
    ]
    for chosen in (slice(None), slice(0, 4)):  # the last one cannot share a prefix
        together = generate_groups(model, groups[chosen], eos=eos, max_tokens=6)
        assert together == expected[chosen]
    assert len({str(answers[0]) for answers in expected}) > 1


def test_groups_that_cannot_share_a_batch_are_answered_one_by_one(tiny: Any) -> None:
    model = tiny("llama")
    path = "model.layers.0.mlp.down_proj"
    other = ModuleWeights({path: -dict(model.named_modules())[path].weight}, {})
    seen: list[tuple[int, int]] = []
    lists = prompts(0)
    plain, changed, empty = generate_groups(
        model, [((), lists), ([other], lists), ((), [])], eos=frozenset(), max_tokens=3,
        progress=lambda _, done, total: seen.append((done, total)),
    )  # fmt: skip
    assert plain == generate_tokens(model, lists, eos=frozenset(), max_tokens=3)
    assert changed != plain and empty == []
    assert seen == sorted(seen) and seen[-1] == (10, 10)


def test_the_shared_prefix_is_found() -> None:
    assert shared_prefix([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3]]) == 2
    assert shared_prefix([[1, 2], [1, 2, 3]]) == 1
    assert shared_prefix([[1, 2, 3], [1, 2, 3]], keep=3) == 0
    assert shared_prefix([[1], [2]]) == 0


def test_uneven_batches_are_proved_before_use(tiny: Any) -> None:
    """Sliding windows share a batch; Gemma 2's masks do not go with mlx-lm's padding."""
    assert uneven_batches(tiny("llama")).ok
    assert uneven_batches(tiny("gemma3_text")).ok
    check = uneven_batches(tiny("gemma2"))
    assert not check.ok and "differ from single prompts" in check.reason


def test_addition_at_prompt_positions_stops_with_the_prompt(tiny: Any) -> None:
    """Under positions="prompt" a decoded token is read without the addition."""
    model = tiny("llama")
    tokens = random_tokens(1, 8)[0].tolist()
    step = 8.0 * mx.random.normal((64,), key=mx.random.key(5))
    found = {}
    for where in ("all", "prompt"):
        change = [Add(step, 1.0, 2, where)]
        found[where] = generate_tokens(
            model, [tokens], eos=frozenset(), max_tokens=4, interventions=change
        )[0]
    # By hand: the prompt with the addition, then plain decoding on the filled cache.
    cache = make_prompt_cache(model)
    out = vauban.forward(
        model, mx.array([tokens]), cache=cache, interventions=[Add(step, 1.0, 2)], logits="last"
    )
    logits, by_hand = out.logits[:, -1], []
    for _ in range(4):
        by_hand.append(int(mx.argmax(logits[0])))
        logits = model(mx.array([[by_hand[-1]]]), cache=cache)[:, -1]
    assert found["prompt"] == by_hand
    assert found["all"][0] == by_hand[0] and found["all"] != by_hand


def test_sampling_is_seeded_and_free_of_the_batch_size(tiny: Any) -> None:
    model = tiny("llama")
    lists = prompts(0)
    run = {
        (seed, size): generate_tokens(
            model, lists, eos=frozenset(), max_tokens=5, temperature=1.0, seed=seed, batch_size=size
        )
        for seed in (0, 1)
        for size in (1, 5)
    }
    assert run[0, 1] == run[0, 5]
    assert run[0, 1] != run[1, 1]


def test_bad_arguments(tiny: Any) -> None:
    with pytest.raises(vauban.InputError, match="max_tokens"):
        generate_tokens(tiny("llama"), [[1]], eos=frozenset(), max_tokens=0)
    with pytest.raises(vauban.InputError, match="no tokens"):
        generate_tokens(tiny("llama"), [[1], []], eos=frozenset())
    with pytest.raises(vauban.InputError, match="temperature"):
        generate_tokens(tiny("llama"), [[1]], eos=frozenset(), temperature=-1.0)


def test_generate_agrees_with_mlx_lm_on_the_organism(organism: Any, organism_prompts: Any) -> None:
    import mlx_lm

    model, tokenizer = organism
    texts = organism_prompts["eval-harmful"][:3] + organism_prompts["eval-task"][:3]
    found = vauban.generate(model, tokenizer, texts, max_tokens=24)
    for text, answer in zip(texts, found, strict=True):
        prompt = vauban.encode_chat(tokenizer, text)
        own = mlx_lm.generate(model, tokenizer, prompt, max_tokens=24)
        assert answer == own.strip()


class Broken:
    """Multiplies one residual, so that it overflows: from the prompt on, or while decoding."""

    def __init__(self, factor: float, prefill: bool) -> None:
        self.factor, self.prefill = factor, prefill

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Any:
        here = (site, layer, prefill) == ("block_input", 3, self.prefill)
        return (lambda h: h * self.factor) if here else None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_broken_logits_are_no_answer(tiny: Any, factor: float, temperature: float) -> None:
    """The arg-max of NaN is token 0: a broken model would seem to say something."""
    model, lists = tiny("llama"), prompts(0)
    for prefill, step in ((True, 1), (False, 2)):
        with pytest.raises(
            vauban.errors.ModelError, match=f"prompt .: the logits of answer token {step} "
        ):
            generate_tokens(
                model, lists, eos=frozenset(), max_tokens=4, temperature=temperature,
                interventions=[Broken(factor, prefill)],
            )  # fmt: skip


def test_a_row_that_has_ended_may_break(tiny: Any) -> None:
    """Its tokens are computed on with the batch, but nobody reads them."""
    model, lists = tiny("llama"), prompts(0)[:2]
    first = [greedy(model, tokens, 1, frozenset())[0] for tokens in lists]
    answers = generate_tokens(
        model,
        lists,
        eos=frozenset(first),
        max_tokens=3,
        interventions=[Broken(float("inf"), False)],
    )
    assert answers == [[], []]


def test_token_ids_are_prompts_as_they_are_for_mlx_lm(organism: Any) -> None:
    import mlx_lm

    model, tokenizer = organism
    ids = vauban.encode_chat(tokenizer, "Name a river.")
    text = vauban.generate(model, tokenizer, ["Name a river."], max_tokens=12)
    for given in (ids, tuple(ids), mx.array(ids)):
        assert vauban.generate(model, tokenizer, [given], max_tokens=12) == text
    assert text == [mlx_lm.generate(model, tokenizer, ids, max_tokens=12).strip()]
    found, expected = (
        vauban.collect_activations(model, tokenizer, [p, "Hello"]).values
        for p in (ids, "Name a river.")
    )
    assert mx.array_equal(found, expected)
    # A raw prompt, without any template.
    raw = tokenizer.encode("The river")
    assert vauban.generate(model, tokenizer, [raw], max_tokens=4) == [
        mlx_lm.generate(model, tokenizer, raw, max_tokens=4).strip()
    ]


def test_bad_prompts_are_named(organism: Any) -> None:
    model, tokenizer = organism
    top = vauban.models.anatomy(model).vocabulary
    for given, message in (
        ("Hello", "prompts is one text"),
        ([[1, top]], f"token ids run from 1 to {top}"),
        ([[-1, 2]], "token ids run from -1 to 2"),
        ([[]], "not empty"),
    ):
        with pytest.raises(vauban.InputError, match=message):
            vauban.generate(model, tokenizer, given)
    with pytest.raises(vauban.InputError, match="batch_size is 0"):
        vauban.generate(model, tokenizer, ["Hello"], batch_size=0)


@drawn(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 30), st.integers(1, 20))
def test_a_loop_is_four_rounds_and_thirty_two_tokens(
    head: list[int], size: int, rounds: int
) -> None:
    passage = [10 + i for i in range(size)]
    found = loop_of(head + passage * rounds)
    if rounds >= 4 and size * rounds >= 32 and size <= 24:
        assert found == passage
    elif found:
        # Only a head that happens to loop itself: it ends with tokens of its own.
        assert not set(found) & set(passage) or size * rounds < 4 * len(found)


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_a_greedy_loop_is_closed_as_it_would_go_on(tiny: Any, temperature: float) -> None:
    """A stream with one huge vector in it says one token for ever; other rows go on."""
    model = tiny("llama")
    parts = vauban.describe(model)
    huge = Add(1e4 * mx.ones((parts.d_model,)), 1.0, parts.n_layers - 1)
    groups: list[Any] = [([huge], prompts(0)), ([], prompts(7))]
    computed: list[int] = []

    def counted(inner: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        computed[-1] += len(x)
        return inner(x, *args, **kwargs)

    generate_groups(model, groups, eos=frozenset(), max_tokens=1)  # measures and checks once
    answers = []
    for close in (False, True):
        computed.append(0)
        with swapped([around(vauban.models.anatomy(model).layers[0], counted)]):
            answers += generate_groups(
                model, groups, eos=frozenset(), max_tokens=80, temperature=temperature,
                close_loops=close,
            )  # fmt: skip
    assert all(loop_of(answer) for answer in answers[0])
    assert answers[0] == answers[2]
    # Random weights break loops again; up to where one was seen both say the same.
    for computed_on, closed in zip(answers[1], answers[3], strict=True):
        seen = next((n for n in range(32, 81, 8) if loop_of(closed[:n])), 80)
        assert computed_on[:seen] == closed[:seen]
    # Five rows of 80 steps end after 32 at the latest. A sampled loop may end, and is not closed.
    saved = computed[0] - computed[1]
    assert saved >= 5 * 40 if temperature == 0 else saved == 0
