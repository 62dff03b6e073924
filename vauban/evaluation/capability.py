"""A small set of tasks with answers that can be checked: arithmetic, facts, code by execution.

It tells whether a change costs what a model can do, offline and in a minute; it ranks no models.
For that there are benchmarks (`vauban study`, [bench]). Knows the packaged tasks and models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.nn as nn

from vauban._common import Progress
from vauban._paths import data_dir
from vauban._results import to_plain
from vauban.evaluation.behaviour import answer_texts, answer_tokens
from vauban.evaluation.degenerate import fold
from vauban.evaluation.intervals import wilson_interval
from vauban.evaluation.run_program import passes
from vauban.interventions import Intervention
from vauban.prompts import split_reasoning
from vauban.prompts.records import read_objects

KINDS = ("arithmetic", "facts", "code")


@dataclass(frozen=True)
class Capability:
    """`correct` of `n` tasks of each kind, by its name; `right` follows the tasks in their order.

    Kinds are "arithmetic" and "facts" (30 each: the answer holds the number or the name as a word
    of its own) and "code" (20: the function passes its tests when it is run).

    >>> found = Capability({"facts": 30}, {"facts": 27}, [], [])
    >>> found.rate("facts"), found.summary()
    (0.9, 'facts 27 of 30')
    """

    n: dict[str, int]
    correct: dict[str, int]
    right: list[bool] = field(repr=False)
    answers: list[str] = field(repr=False)

    def rate(self, kind: str) -> float:
        """The share of one kind's tasks that are right."""
        return self.correct[kind] / self.n[kind]

    def interval(self, kind: str) -> tuple[float, float]:
        """The 95 % Wilson interval of `rate`."""
        return wilson_interval(self.correct[kind], self.n[kind])

    def summary(self) -> str:
        return "; ".join(f"{kind} {self.correct[kind]} of {self.n[kind]}" for kind in self.n)

    def to_dict(self) -> dict[str, Any]:
        return to_plain(self)


def measure_capability(
    model: nn.Module,
    tokenizer: Any,
    *,
    interventions: Iterable[Intervention] = (),
    kinds: Sequence[str] = KINDS,
    limit: int | None = None,
    max_tokens: int = 160,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Capability:
    """Greedy answers to the packaged tasks under `interventions`, each checked.

    `limit` takes the first tasks of each kind. Two results on the same tasks are compared in pairs
    with `paired_test(a.right, b.right)`. Code is run in a process of its own: see `run_program` for
    what is refused. An answer that `max_tokens` cuts is checked as far as it goes.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> found = vauban.measure_capability(model, tokenizer, kinds=["facts"], limit=2, max_tokens=4)
    >>> found.n
    {'facts': 2}
    """
    every = [row for _, row in read_objects(data_dir() / "prompts" / "capability.jsonl")]
    rows = [r for kind in kinds for r in [r for r in every if r["kind"] == kind][:limit]]
    prompts = [row["prompt"] for row in rows]
    ids = answer_tokens(
        model, tokenizer, prompts, max_tokens=max_tokens, interventions=interventions,
        batch_size=batch_size, progress=progress,
    )  # fmt: skip
    answers = [split_reasoning(text).answer for text in answer_texts(tokenizer, prompts, ids)]
    right = [_is_right(answer, row) for answer, row in zip(answers, rows, strict=True)]
    n = {kind: sum(row["kind"] == kind for row in rows) for kind in kinds}
    correct = {
        kind: sum(ok and row["kind"] == kind for ok, row in zip(right, rows, strict=True))
        for kind in kinds
    }
    return Capability(n, correct, right, answers)


def _is_right(answer: str, row: dict[str, Any]) -> bool:
    if row["kind"] == "code":
        return passes(answer, row["tests"])
    return any(names(answer, expected) for expected in row["answer"])


def names(answer: str, expected: str) -> bool:
    """Whether `expected` stands in an answer as a word or a number of its own.

    >>> names("It is 85.", "85"), names("1,850", "85"), names("8.5", "5"), names("Paris!", "paris")
    (True, False, False, True)
    """
    return bool(
        re.search(rf"(?<![\w.,−-]){re.escape(fold(expected))}(?![\w]|[.,]\d)", fold(answer))
    )
