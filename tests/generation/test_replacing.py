"""Rows that end make room for prompts that wait: the same answers in fewer rows computed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import pytest

import vauban
from tests.conftest import TINY, random_tokens
from vauban.generation import PromptReading, generate_groups, generate_tokens
from vauban.generation.uneven import rows_can_join, uneven_batches
from vauban.interventions import ModuleOutputs
from vauban.models import anatomy
from vauban.models.swap import around, swapped

LENGTHS = (3, 9, 9, 5, 14, 4, 11, 6, 8, 3)


def prompts(prefix: int = 0) -> list[list[int]]:
    head = random_tokens(1, max(prefix, 1), seed=9)[0].tolist()[:prefix]
    return [
        head + random_tokens(1, n, seed=20 + i)[0].tolist() for i, n in enumerate(LENGTHS)
    ]  # fmt: skip


# Drawn answers, one token in ten an end: of all lengths, while a tiny greedy one says one token.
DRAWN: dict[str, Any] = {"eos": frozenset(range(0, 160, 10)), "max_tokens": 20, "temperature": 1.0}


@contextmanager
def passes(model: Any) -> Iterator[list[tuple[int, int]]]:
    """(rows, tokens) of every pass through the first block."""
    seen: list[tuple[int, int]] = []

    def counted(inner: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        seen.append(x.shape[:2])
        return inner(x, *args, **kwargs)

    with swapped([around(anatomy(model).layers[0], counted)]):
        yield seen


@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize("prefix", [0, 7])
def test_late_rows_answer_as_alone(tiny: Any, name: str, prefix: int) -> None:
    """Twenty tokens: sliding windows (8 here) go round several times, with newcomers in them."""
    model, lists = tiny(name), prompts(prefix)
    # Gemma's logits are as large as its embedding is scaled.
    options = {**DRAWN, "temperature": 30.0 if name == "gemma" else 1.0}
    expected = generate_tokens(model, lists, batch_size=1, **options)
    assert len({len(answer) for answer in expected}) > 3
    for size in (2, 3, 4):
        assert generate_tokens(model, lists, batch_size=size, **options) == expected
    assert rows_can_join(model).ok == uneven_batches(model).ok


def test_places_of_ended_rows_are_not_left_idle(tiny: Any) -> None:
    model, lists = tiny("llama"), prompts()
    expected = generate_tokens(model, lists, batch_size=4, **DRAWN)
    with passes(model) as seen:
        generate_tokens(model, lists, batch_size=4, **DRAWN)
    steps = [rows for rows, tokens in seen if tokens == 1]
    # In batches one after the other every batch takes the steps of its longest answer.
    order = sorted(range(len(lists)), key=lambda row: -len(lists[row]))
    lengths = [min(19, len(expected[row])) for row in order]
    one_by_one = sum(max(lengths[start : start + 4]) for start in range(0, len(order), 4))
    assert len(steps) <= 0.75 * one_by_one
    assert max(steps) == 4 and sum(rows for rows, tokens in seen if tokens > 1) == len(lists)


def test_changes_stay_with_their_rows(tiny: Any) -> None:
    """Groups of several changes in batches that hold few of them at a time."""
    model, lists = tiny("llama"), prompts(7)
    unit = mx.random.normal((vauban.describe(model).d_model,), key=mx.random.key(3))
    unit /= mx.linalg.norm(unit)
    writers = [w.path for w in vauban.residual_writers(model)][1:3]
    changes: list[list[Any]] = [
        [],
        [vauban.Ablate(unit)],
        [ModuleOutputs({path: (unit[None], 1.0) for path in writers})],
        [vauban.Add(4.0 * unit, 1.0, 1)],
    ]
    expected = [
        generate_tokens(model, lists, interventions=change, batch_size=1, **DRAWN)
        for change in changes
    ]
    groups = [(change, lists) for change in changes]
    assert generate_groups(model, groups, batch_size=7, **DRAWN) == expected
    assert len({str(answers) for answers in expected}) == len(changes)


def test_residuals_of_late_rows_are_kept(tiny: Any) -> None:
    model, lists = tiny("llama"), prompts(7)
    found = {}
    for size in (3, None):
        reading = PromptReading((-2, -1))
        generate_tokens(model, lists, batch_size=size, reading=reading, **DRAWN)
        found[size] = [reading.values[row] for row in range(len(lists))]
    for late, together in zip(found[3], found[None], strict=True):
        assert mx.allclose(late, together, rtol=1e-4, atol=1e-5)


def test_nobody_joins_rows_under_a_change_that_knows_its_prompts(tiny: Any) -> None:
    model, lists = tiny("llama"), prompts()
    unit = mx.random.normal((vauban.describe(model).d_model,), key=mx.random.key(3))
    change = [vauban.Conditional(unit / mx.linalg.norm(unit), 0.0, vauban.Ablate(unit), layer=1)]
    expected = generate_tokens(model, lists, batch_size=1, interventions=change, **DRAWN)
    with passes(model) as seen:
        found = generate_tokens(model, lists, batch_size=3, interventions=change, **DRAWN)
    assert found == expected
    assert [rows for rows, tokens in seen if tokens > 1] == [3, 3, 3, 1]


def test_a_short_prompt_brings_places_with_it(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may be read at once is counted in tokens: few long prompts, many short ones."""
    model = tiny("llama")
    monkeypatch.setattr(sys.modules["vauban.generation.generate"], "token_budget", lambda _: 24)
    lists = [random_tokens(1, n, seed=n)[0].tolist() for n in (12, 11, 4, 4, 3, 3, 2)]
    expected = generate_tokens(model, lists, eos=frozenset(), max_tokens=6)
    with passes(model) as seen:
        found = generate_tokens(model, lists, eos=frozenset(), max_tokens=6)
    single = [generate_tokens(model, [t], eos=frozenset(), max_tokens=6)[0] for t in lists]
    assert found == expected == single
    # Two of twelve tokens fill a pass; then four more fit beside them, then one, before any ends.
    assert [rows for rows, tokens in seen if tokens > 1] == [2, 4, 1]
    assert [rows for rows, tokens in seen if tokens == 1] == [7] * 5


def test_one_place_more_is_not_worth_a_pass(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter prompts make room for a sixth row beside five: it waits until a quarter is free."""
    model = tiny("llama")
    monkeypatch.setattr(sys.modules["vauban.generation.generate"], "token_budget", lambda _: 60)
    lists = [random_tokens(1, n, seed=i)[0].tolist() for i, n in enumerate((12,) * 5 + (10,) * 3)]
    generate_tokens(model, lists, eos=frozenset(), max_tokens=4)
    with passes(model) as seen:
        generate_tokens(model, lists, eos=frozenset(), max_tokens=4)
    assert [rows for rows, tokens in seen if tokens > 1] == [5, 3]
