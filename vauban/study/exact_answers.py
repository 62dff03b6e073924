"""Task accuracy: exact answers to labelled rows, with a Wilson interval, under interventions.

Knows rows that hold an `answer`; judges by equality alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.nn as nn

from vauban._common import Progress
from vauban._results import to_plain
from vauban.errors import InputError
from vauban.evaluation import wilson_interval
from vauban.evaluation.behaviour import answer_texts, answer_tokens
from vauban.evaluation.verdicts import is_refusal
from vauban.interventions import Intervention
from vauban.prompts import LabelledPrompt, strip_thinking
from vauban.study.figures import Metric


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
        return to_plain(self)


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
    >>> task_accuracy(model, tokenizer, tasks).n
    4
    """
    tasks = [row for row in rows if row.get("answer")]
    if not tasks:
        raise InputError(f"none of the {len(rows)} rows has an 'answer' to compare with")
    prompts = [row.prompt for row in tasks]
    ids = answer_tokens(
        model, tokenizer, prompts,
        max_tokens=max_tokens, interventions=interventions, progress=progress,
    )  # fmt: skip
    answers = [strip_thinking(text).strip() for text in answer_texts(tokenizer, prompts, ids)]
    right = [a == str(row["answer"]).strip() for a, row in zip(answers, tasks, strict=True)]
    return TaskAccuracy(
        len(right), sum(right), sum(map(is_refusal, answers)), sum(right) / len(right),
        wilson_interval(sum(right), len(right)), answers, right,
    )  # fmt: skip
