"""Estimators on arrays: X (n, d), y (n,) in {0, 1}, 1 = harmful. They see no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from vauban._common import RELATIVE_NOISE
from vauban.errors import InputError


@dataclass(frozen=True, eq=False)
class Direction:
    """A fitted direction: `vector` (d,) raw, not normalised; w.x + bias > 0 says harmful."""

    vector: mx.array
    bias: float
    method: str

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

    Arditi et al. 2024 (arXiv 2406.11717), eq. 1; Belrose (2023) on why it is the right default.

    >>> import mlx.core as mx
    >>> fit_mean_difference(mx.array([[0.0, 1], [2, 1]]), mx.array([0, 1])).vector.tolist()
    [2.0, 0.0]
    """
    x, harmful = check_labelled(X, y)
    positive = x[mx.array(np.flatnonzero(harmful))].mean(axis=0)
    negative = x[mx.array(np.flatnonzero(~harmful))].mean(axis=0)
    vector = positive - negative
    scale = float(mx.maximum(mx.linalg.norm(positive), mx.linalg.norm(negative)))
    if float(mx.linalg.norm(vector)) <= RELATIVE_NOISE * scale:
        raise InputError("the class means are equal: there is no direction between them")
    bias = -float((vector * (positive + negative) / 2).sum())
    return Direction(vector, bias, "mean_difference")
