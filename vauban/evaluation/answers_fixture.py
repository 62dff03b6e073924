"""The packaged labelled answers that a judge has to pass, and a rule's score on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vauban._paths import data_dir
from vauban.errors import InputError
from vauban.evaluation.verdicts import LABELS, Label
from vauban.prompts.records import file_rows


@dataclass(frozen=True)
class LabelledAnswer:
    """An answer with its verdict; `kind` says what it is an example of."""

    prompt: str
    answer: str
    label: Label
    language: str
    kind: str
    finished: bool


def labelled_answers() -> list[LabelledAnswer]:
    """The packaged fixture: 175 answers, five verdicts, ten languages.

    >>> len(labelled_answers())
    175
    """
    rows = file_rows(data_dir() / "verdicts" / "answers.jsonl")
    return [LabelledAnswer(**values) for _, values in rows]


def macro_f1(truth: Sequence[str | None], given: Sequence[str | None]) -> float:
    """The mean over the verdicts that occur of F1 = 2 · both / (true + given).

    >>> macro_f1(["refused", "answered"], ["refused", "refused"])
    0.3333333333333333
    """
    if len(truth) != len(given) or not truth:
        raise InputError(f"{len(truth)} labels and {len(given)} verdicts; expected one of each")
    scores = []
    for label in LABELS:
        total = list(truth).count(label) + list(given).count(label)
        both = sum(a == b == label for a, b in zip(truth, given, strict=True))
        if total:
            scores.append(2 * both / total)
    return sum(scores) / len(scores)
