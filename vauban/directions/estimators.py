"""Estimators on arrays: X (n, d), y (n,) in {0, 1}, 1 = harmful. They see no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from vauban._common import RELATIVE_NOISE
from vauban.activations import ActivationMoments
from vauban.directions import mean_estimators
from vauban.directions.loud_coordinates import LOUD_MULTIPLE, MASKED, check_multiple, standing_out
from vauban.errors import InputError


@dataclass(frozen=True, eq=False)
class Direction:
    """A fitted direction: `vector` (d,) raw, not normalised; w.x + bias > 0 says harmful.

    `masked` are the coordinates that the estimator left out.

    >>> import mlx.core as mx
    >>> fitted = fit_mean_difference(mx.array([[0.0, 1], [2, 1]]), mx.array([0, 1]))
    >>> fitted.unit.tolist(), fitted.bias, fitted.method
    ([1.0, 0.0], -2.0, 'mean_difference')
    """

    vector: mx.array
    bias: float
    method: str
    masked: tuple[int, ...] = ()

    @property
    def unit(self) -> mx.array:
        """(d,) of norm 1."""
        return self.vector / mx.linalg.norm(self.vector)

    def summary(self) -> str:
        norm = float(mx.linalg.norm(self.vector))
        return f"{self.method} direction, d = {self.vector.size}, norm {norm:.3g}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "d": int(self.vector.size),
            "norm": float(mx.linalg.norm(self.vector)),
            "bias": self.bias,
            "masked": list(self.masked),
        }


def check_labelled(X: mx.array, y: mx.array) -> tuple[mx.array, np.ndarray]:
    """X in float32, y as a bool array; InputError for wrong shapes or labels, NaN, one class."""
    labels = np.array(y).astype(np.int64).reshape(-1)
    if X.ndim != 2 or X.shape[0] != labels.size:
        raise InputError(f"X has shape {X.shape}, y {labels.shape}; expected (n, d) and (n,)")
    if not set(labels.tolist()) <= {0, 1}:
        raise InputError(
            f"labels {sorted(set(labels.tolist()))}; expected 0 (harmless), 1 (harmful)"
        )
    ones = int(labels.sum())
    if ones in (0, labels.size):
        raise InputError(f"{ones} of {labels.size} samples are harmful; both classes are needed")
    x = X.astype(mx.float32)
    if not bool(mx.isfinite(x).all()):
        raise InputError("X holds NaN or inf; expected finite activations")
    return x, labels.astype(bool)


def fit_mean_difference(X: mx.array, y: mx.array) -> Direction:
    """Difference in means v = mean(X | 1) - mean(X | 0), bias at the midpoint.

    X (n, d), y (n,) in {0, 1}. Arditi et al. 2024 (arXiv 2406.11717), eq. 1; Belrose (2023) on why
    it is the right default.

    Raises InputError for one class, wrong shapes or labels, NaN, and means that are equal.

    >>> import mlx.core as mx
    >>> fit_mean_difference(mx.array([[0.0, 1], [2, 1]]), mx.array([0, 1])).vector.tolist()
    [2.0, 0.0]
    """
    low, high = _moments(X, y)
    return _direction(low, high, mean_estimators.mean_difference(low, high), "mean_difference")


def fit_masked_difference(
    X: mx.array, y: mx.array, *, loud_multiple: float = LOUD_MULTIPLE
) -> Direction:
    """Difference in means, zero where the harmless mean exceeds a multiple of the median.

    X (n, d), y (n,) in {0, 1}. Class-blind: the mask is read off the harmless rows alone, where
    |mean_c| exceeds loud_multiple times the median over coordinates. A coordinate of a size far
    beyond the others' (a massive activation, Sun et al. 2024, arXiv 2402.17762) rules the plain
    difference whatever it tells of the classes. Where nothing stands out, the vector is
    `fit_mean_difference`'s, bit for bit. `masked` names the coordinates.

    Raises InputError for a multiple of 1 or less, and for a mask that leaves nothing.

    >>> import mlx.core as mx
    >>> X = mx.array([[0.5, 0.4, 900], [0.5, 0.6, 800], [1.5, 0.4, 700], [1.5, 0.6, 900]])
    >>> fitted = fit_masked_difference(X, mx.array([0, 0, 1, 1]))
    >>> fitted.masked, fitted.vector.tolist()
    ((2,), [1.0, 0.0, 0.0])
    """
    multiple = check_multiple(loud_multiple)
    low, high = _moments(X, y)
    mask = standing_out(np.array(low.mean), multiple)
    masked = tuple(int(c) for c in np.flatnonzero(mask))
    vector = mean_estimators.masked_difference(low, high, multiple=multiple)
    mean_estimators.check_mask(vector, low.mean, high.mean, masked)
    return _direction(low, high, vector, MASKED, masked)


def fit_scaled_difference(X: mx.array, y: mx.array) -> Direction:
    """Difference in means over the shrunk within-class variance of each coordinate.

    X (n, d), y (n,) in {0, 1}. Weights of a diagonal linear discriminant analysis (Dudoit,
    Fridlyand and Speed 2002), the variances shrunk towards their median (Opgen-Rhein and Strimmer
    2007); `mean_estimators` has the formula. A coordinate counts by how well it tells the classes
    apart, not by its size. The vector's length is the gap of the class means along it.

    Raises InputError for one class, wrong shapes or labels, NaN, and means that are equal.

    >>> import mlx.core as mx
    >>> X = mx.array([[0.0, 0], [0.2, 40], [1.0, 0], [1.2, 44]] * 20)
    >>> unit = fit_scaled_difference(X, mx.array([0, 0, 1, 1] * 20)).unit
    >>> bool(unit[0] > 0.99)
    True
    """
    low, high = _moments(X, y)
    return _direction(low, high, mean_estimators.scaled_difference(low, high), "variance_scaled")


def _moments(X: mx.array, y: mx.array) -> tuple[ActivationMoments, ActivationMoments]:
    """The moments of the harmless and of the harmful rows."""
    x, harmful = check_labelled(X, y)
    low, high = (
        ActivationMoments().update(x[mx.array(np.flatnonzero(rows))])
        for rows in (~harmful, harmful)
    )
    return low, high


def _direction(
    low: ActivationMoments, high: ActivationMoments, vector: mx.array, method: str,
    masked: tuple[int, ...] = (),
) -> Direction:  # fmt: skip
    # What is masked may be far larger than the rest; it does not decide what noise is.
    kept = [mx.where(vector == 0, mx.zeros_like(vector), one.mean) for one in (low, high)]
    scale = max(float(mx.linalg.norm(mean)) for mean in kept)
    if float(mx.linalg.norm(vector)) <= RELATIVE_NOISE * scale:
        raise InputError("the class means are equal: there is no direction between them")
    bias = -float((vector * (low.mean + high.mean) / 2).sum())
    return Direction(vector, bias, method, masked)
