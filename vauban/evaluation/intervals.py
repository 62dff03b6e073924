"""Intervals on rates and on token-weighted means. Knows numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vauban.errors import InputError

_Z = 1.959963984540054


def wilson_interval(k: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a rate k/n (Wilson 1927); (0, 1) for n = 0.

    Raises InputError for a count below 0 or above n.

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


def bootstrap_interval(
    totals: Sequence[float],
    counts: Sequence[int],
    *,
    clusters: Sequence[Any] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of Σ totals / Σ counts, texts drawn with replacement (Efron 1979).

    `totals` (n,) and `counts` (n,) belong to texts, for example a text's summed negative
    log-likelihood and its tokens: tokens of one text depend on each other, texts do not, so texts
    are drawn. Where texts share a template, `clusters` (n,) names it, and whole templates are
    drawn: rows of one template are no independent observations. Raises InputError for fewer than
    two texts or clusters, which have no spread, and for NaN.

    >>> bootstrap_interval([2.0, 4.0, 6.0], [1, 2, 3])
    (2.0, 2.0)
    """
    sums = np.asarray(totals, dtype=np.float64)
    sizes = np.asarray(counts, dtype=np.float64)
    if sums.shape != sizes.shape or sums.ndim != 1 or len(sums) < 2 or sizes.min() <= 0:
        raise InputError(
            f"totals {sums.shape} and counts {sizes.shape}; expected one of each per text, at "
            "least two texts, counts at least 1"
        )
    if not np.isfinite(sums).all():
        raise InputError("totals hold NaN or inf; a mean of them has no interval")
    if clusters is not None:
        if len(clusters) != len(sums):
            raise InputError(f"{len(clusters)} clusters for {len(sums)} texts; expected one each")
        names = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
        if len(names) < 2:
            raise InputError("all texts share one cluster; a single one has no spread")
        place = np.array([names[name] for name in clusters])
        sums = np.bincount(place, weights=sums).astype(np.float64)
        sizes = np.bincount(place, weights=sizes).astype(np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        drawn = generator.integers(0, len(sums), len(sums))
        means[i] = sums[drawn].sum() / sizes[drawn].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
