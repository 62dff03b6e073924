"""Intervals on rates. Knows numbers only."""

from __future__ import annotations

import math

from vauban.errors import InputError

_Z = 1.959963984540054


def wilson_interval(k: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a rate k/n (Wilson 1927); (0, 1) for n = 0.

    >>> low, high = wilson_interval(0, 100)
    >>> low, round(high, 3)
    (0.0, 0.037)
    """
    if n < 0 or not 0 <= k <= n:
        raise InputError(f"k = {k}, n = {n}; expected 0 <= k <= n")
    if n == 0:
        return 0.0, 1.0
    p, z2 = k / n, _Z**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At the ends the formula gives 0 and 1 up to rounding; make them exact.
    return (0.0 if k == 0 else middle - half), (1.0 if k == n else middle + half)
