"""Task accuracy: exact answers to labelled rows, with a Wilson interval, under interventions.

Knows rows that hold an `answer`; generates through `behaviour`, judges by equality alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.nn as nn

from vauban._common import Progress
from vauban.errors import InputError
from vauban.evaluation.behaviour import answer_tokens
from vauban.evaluation.metrics import Metric
from vauban.evaluation.refusal import is_refusal
from vauban.interventions import Intervention
from vauban.models import decode
from vauban.prompts import LabelledPrompt, strip_thinking


@dataclass(frozen=True)
class TaskAccuracy:
    """`correct` of `n` answers equal the row's `answer`; `interval` is the 95 % Wilson interval.

    `refused` counts answers that refuse; they are wrong too. `answers` and `right` follow the rows.
    """

    n: int
    correct: int
    refused: int
    rate: float
    interval: tuple[float, float]
    answers: list[str] = field(repr=False)
    right: list[bool] = field(repr=False)

    def metric(self) -> Metric:
        """Accuracy as a `Metric`, higher is better."""
        return Metric.rate("task_accuracy", self.correct, self.n, unit="tasks")

    def summary(self) -> str:
        return f"{self.metric().summary()}; {self.refused} refused"

    def to_dict(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "correct": self.correct,
            "refused": self.refused,
            "rate": self.rate,
            "interval": list(self.interval),
        }


def task_accuracy(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[LabelledPrompt],
    *,
    interventions: Iterable[Intervention] = (),
    max_tokens: int = 40,
    progress: Progress | None = None,
) -> TaskAccuracy:
    """Share of `rows` with an `answer` that are answered exactly, greedily, to the letter.

    Rows without an `answer` are left out. White space around an answer and a thinking block
    before it do not count. For models that were taught the tasks, such as the organisms; a large
    model that answers in a sentence of its own is measured by `run_benchmarks`.

    Raises InputError when no row has an answer.

    >>> import vauban
    >>> folder = vauban.organism_path("dense")
    >>> model, tokenizer = vauban.load(folder)
    >>> rows = vauban.load_labelled_prompts(folder / "prompts" / "eval.jsonl")
    >>> tasks = [row for row in rows if row.get("answer")][:4]
    >>> vauban.task_accuracy(model, tokenizer, tasks).n
    4
    """
    asked = [row for row in rows if row.get("answer")]
    if not asked:
        raise InputError(f"none of the {len(rows)} rows has an 'answer' to compare with")
    ids = answer_tokens(
        model, tokenizer, [row.prompt for row in asked],
        max_tokens=max_tokens, interventions=interventions, progress=progress,
    )  # fmt: skip
    answers = [strip_thinking(decode(tokenizer, answer)).strip() for answer in ids]
    right = [a == str(row["answer"]).strip() for a, row in zip(answers, asked, strict=True)]
    rate = Metric.rate("task_accuracy", sum(right), len(right), unit="tasks")
    assert rate.value is not None and rate.interval is not None
    return TaskAccuracy(
        len(right), sum(right), sum(map(is_refusal, answers)), rate.value, rate.interval,
        answers, right,
    )  # fmt: skip
