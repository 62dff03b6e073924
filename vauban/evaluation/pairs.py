"""Before and after on the same prompts: which verdicts changed, and how sure the change is.

Knows pairs of booleans only. `intervals` measures single rates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vauban._results import to_plain
from vauban.errors import InputError, shown

_Z = 1.959963984540054


@dataclass(frozen=True)
class PairedResult:
    """What changed over `n` pairs; `difference` is the rate after minus the rate before.

    Attributes:
        only_before: pairs that are true before and false after.
        only_after: pairs that are false before and true after.
        p_value: of the exact McNemar test, two-sided.
        difference: in [-1, 1]: (only_after - only_before) / n.
        interval: 95 % score interval of the difference.
        n: pairs in all, the unchanged ones included.

    >>> result = paired_test([True, True, False], [False, True, False])
    >>> result.only_before, result.only_after, result.n, round(result.difference, 2)
    (1, 0, 3, -0.33)
    """

    only_before: int
    only_after: int
    p_value: float
    difference: float
    interval: tuple[float, float]
    n: int

    def summary(self) -> str:
        low, high = self.interval
        return (
            f"{self.only_before} of {self.n} only before, {self.only_after} only after; "
            f"difference {100 * self.difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}],"
            f" p = {self.p_value:.2g}"
        )

    def to_dict(self) -> dict[str, Any]:
        return to_plain(self)


def paired_verdicts(
    before: Iterable[bool | None], after: Iterable[bool | None]
) -> PairedResult | None:
    """`paired_test` over the pairs with a verdict on both sides; None where there is none.

    >>> paired_verdicts([True, None, True], [False, True, None]).n
    1
    """
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    return paired_test([a for a, _ in pairs], [b for _, b in pairs]) if pairs else None


def paired_test(before: Sequence[bool], after: Sequence[bool]) -> PairedResult:
    """Compare two verdicts on each of the same prompts, in the same order.

    The p-value is McNemar's exact one (McNemar 1947): under the hypothesis of no change each
    changed pair goes either way with probability 1/2, so the smaller count follows Bin(changed,
    1/2). The interval is Tango's score interval of a paired difference (Tango 1998, Statistics in
    Medicine 17, 891-908). It needs no correction for small n and never leaves [-1, 1].
    Unchanged pairs narrow the interval and leave the p-value alone.

    A pair without a verdict on either side belongs in neither sequence. Repeated prompts count as
    independent pairs: take them out first.

    Raises InputError for sequences that are empty, of unequal length, or hold anything but bools.

    >>> result = paired_test([True] * 9 + [False], [True] + [False] * 9)
    >>> result.only_before, result.only_after, round(result.p_value, 4), result.difference
    (8, 0, 0.0078, -0.8)
    """
    pairs = list(zip(_bools("before", before), _bools("after", after), strict=False))
    if len(before) != len(after) or not pairs:
        raise InputError(
            f"{len(before)} verdicts before and {len(after)} after; expected one of each per "
            "prompt, and at least one prompt"
        )
    lost = sum(a and not b for a, b in pairs)
    gained = sum(b and not a for a, b in pairs)
    return PairedResult(
        only_before=lost,
        only_after=gained,
        p_value=_exact_mcnemar(lost, gained),
        difference=(gained - lost) / len(pairs),
        interval=_score_interval(gained, lost, len(pairs)),
        n=len(pairs),
    )


def _bools(name: str, values: Sequence[bool]) -> list[bool]:
    for place, value in enumerate(values):
        if not isinstance(value, bool | np.bool_):
            raise InputError(
                f"{name}[{place}] is {shown(value)}; expected True or False. Leave out pairs "
                "without a verdict"
            )
    return [bool(value) for value in values]


def _exact_mcnemar(lost: int, gained: int) -> float:
    """min(1, 2 P(X <= min)), X ~ Bin(lost + gained, 1/2), from whole numbers."""
    changed, smaller = lost + gained, min(lost, gained)
    ways, total = 1, 0
    for k in range(smaller + 1):
        total += ways
        ways = ways * (changed - k) // (k + 1)
    return min(1.0, 2 * total / 2**changed)


def _score_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """The differences that the score test at 5 % does not reject (Tango 1998, eq. 4 and 9)."""
    estimate = (gained - lost) / n

    def rejected(difference: float) -> bool:
        return abs(_score(gained, lost, n, difference)) > _Z

    ends = []
    for limit in (-1.0, 1.0):
        inside, outside = estimate, limit
        if not rejected(limit):
            ends.append(limit)
            continue
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
        ends.append(inside)
    return ends[0], ends[1]


def _score(gained: int, lost: int, n: int, difference: float) -> float:
    """Tango's statistic: N(0, 1) where `difference` is the true one.

    `q` is the probability of a lost pair that is most likely under that difference.
    """
    numerator = gained - lost - n * difference
    a = 2 * n
    b = -gained - lost + (2 * n - gained + lost) * difference
    c = -lost * difference * (1 - difference)
    q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = n * (2 * q + difference * (1 - difference))
    if abs(numerator) < 1e-12 * n:
        return 0.0
    return numerator / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, numerator)
