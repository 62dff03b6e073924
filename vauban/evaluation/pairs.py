"""Two verdicts on each of the same prompts: the exact McNemar test. Knows booleans only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vauban._results import to_plain
from vauban.errors import InputError

_Z = 1.959963984540054


@dataclass(frozen=True)
class PairedResult:
    """Prompts with a verdict on one side alone, and what they say of the difference.

    `difference` is the rate after minus the rate before, `interval` its 95 % interval.
    """

    only_before: int
    only_after: int
    p_value: float
    difference: float
    interval: tuple[float, float]

    def summary(self) -> str:
        low, high = self.interval
        return (
            f"difference {self.difference:+.1%} [{low:+.1%}, {high:+.1%}], {self.only_before} only "
            f"before, {self.only_after} only after, exact p = {self.p_value:.3g}"
        )

    def to_dict(self) -> dict[str, Any]:
        return to_plain(self)


def paired_test(before: Sequence[bool], after: Sequence[bool]) -> PairedResult:
    """Exact McNemar test (two-sided binomial on the discordant pairs) of verdicts on equal prompts.

    The interval is Agresti and Min's (2005): Wald with half a prompt added to each of the four
    cells. Raises InputError for no prompts, or two lists of different length.

    >>> paired_test([True] * 6 + [False] * 4, [False] * 10).p_value
    0.03125
    """
    if len(before) != len(after) or not before:
        raise InputError(
            f"{len(before)} verdicts before and {len(after)} after; expected one of each per "
            "prompt, and at least one prompt"
        )
    only_before = sum(bool(b) and not a for b, a in zip(before, after, strict=True))
    only_after = sum(bool(a) and not b for b, a in zip(before, after, strict=True))
    discordant, n = only_before + only_after, len(before)
    fewer = min(only_before, only_after)
    tail = sum(math.comb(discordant, k) for k in range(fewer + 1)) / 2**discordant
    middle = (only_after - only_before) / (n + 2)
    b, c = only_before + 0.5, only_after + 0.5
    half = _Z * math.sqrt(b + c - (c - b) ** 2 / (n + 2)) / (n + 2)
    return PairedResult(
        only_before, only_after, min(1.0, 2 * tail), (only_after - only_before) / n,
        (max(-1.0, middle - half), min(1.0, middle + half)),
    )  # fmt: skip
