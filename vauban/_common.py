"""What every room shares: the progress callable, the level of rounding noise, fixed probe tokens.

Knows Python numbers; imports neither mlx nor any room.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total) as a long function goes on."""

RELATIVE_NOISE = 1e-6
"""Float32 results that differ by less than this share of their size differ by rounding alone."""

# Multiplier and offset of each walk through the vocabulary. The multipliers are primes, so a walk
# meets every token of a vocabulary that they do not divide before it repeats one.
_WALKS = ((7919, 13), (104729, 5), (31337, 7))
# Past this id vocabularies hold special and unused tokens.
_ORDINARY = 50_000


def probe_tokens(count: int, vocabulary: int, walk: int = 0) -> list[int]:
    """`count` token ids that are the same in every run: one of three fixed walks.

    >>> probe_tokens(3, 1000)
    [13, 932, 851]
    """
    step, start = _WALKS[walk]
    return [(i * step + start) % min(vocabulary, _ORDINARY) for i in range(count)]


def largest(values: Iterable[float]) -> float:
    """The largest value, 0.0 without any; NaN where one of them is NaN.

    `max` passes over a NaN that is not its first value, so a broken stream would look perfect.

    >>> largest([0.1, math.nan, 0.2])
    nan
    """
    listed = list(values)
    return math.nan if any(map(math.isnan, listed)) else max(listed, default=0.0)
