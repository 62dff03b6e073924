"""Geometric median by Weiszfeld's iteration, and the difference of two. Knows arrays only."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from vauban._common import RELATIVE_NOISE
from vauban.directions.classifiers import float64_rows
from vauban.directions.estimators import Direction, check_labelled
from vauban.errors import InputError


def geometric_median(X: mx.array, *, tolerance: float = 1e-12, max_steps: int = 2000) -> mx.array:
    """(d,) the point with the smallest sum of distances to the rows of X (n, d).

    Weiszfeld 1937 with the step of Vardi and Zhang (2000), which leaves a data point that the
    iteration lands on unless it is the median itself. A few outliers cannot move it far.

    Raises InputError for another shape, no rows, and NaN or inf.

    >>> import mlx.core as mx
    >>> m = geometric_median(mx.array([[0.0, 0], [0, 0], [0, 0], [900, 0]]))
    >>> [round(v, 6) for v in m.tolist()]
    [0.0, 0.0]
    """
    if X.ndim != 2 or X.shape[0] == 0:
        raise InputError(f"X has shape {X.shape}; expected (n, d) with at least one row")
    return mx.array(_median(float64_rows(X), tolerance, max_steps).astype(np.float32))


def _median(rows: np.ndarray, tolerance: float = 1e-12, max_steps: int = 2000) -> np.ndarray:
    m = rows.mean(axis=0)
    spread = float(np.linalg.norm(rows - m, axis=1).mean())
    for _ in range(max_steps):
        distance = np.linalg.norm(rows - m, axis=1)
        here = distance <= 1e-14 * spread
        weights = np.where(here, 0.0, 1.0 / np.where(here, 1.0, distance))
        if not weights.sum() > 0:
            break
        target = weights @ rows / weights.sum()
        pull = weights @ (rows - m)
        # With eta rows on m itself, the pull of the others has to exceed eta to move it.
        strength = float(np.linalg.norm(pull))
        share = max(0.0, 1.0 - here.sum() / strength) if strength > 0 else 0.0
        step = share * (target - m)
        m = m + step
        if np.linalg.norm(step) <= tolerance * max(spread, 1e-300):
            break
    return m


def fit_geometric_median(X: mx.array, y: mx.array) -> Direction:
    """Difference of the classes' geometric medians, bias at their midpoint.

    X (n, d), y (n,) in {0, 1}. The robust form of the mean difference.

    Raises InputError for one class, wrong shapes or labels, NaN, and medians that are equal.

    >>> import mlx.core as mx
    >>> X = mx.array([[0.0, 0], [0, 0], [2, 0], [2, 0]])
    >>> fit_geometric_median(X, mx.array([0, 0, 1, 1])).vector.tolist()
    [2.0, 0.0]
    """
    _, labels = check_labelled(X, y)
    rows = float64_rows(X)
    high, low = _median(rows[labels]), _median(rows[~labels])
    vector = high - low
    if np.linalg.norm(vector) <= RELATIVE_NOISE * max(np.linalg.norm(high), np.linalg.norm(low)):
        raise InputError("the class medians are equal: there is no direction between them")
    bias = -float(vector @ (high + low) / 2)
    return Direction(mx.array(vector.astype(np.float32)), bias, "geometric_median")
