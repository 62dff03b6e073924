"""Classifier weights as directions: logistic regression, linear SVM, linear discriminant.

An L2-penalised weight vector lies in the span of the training rows, so n rows of d > n components
are replaced by their coordinates in an orthonormal basis, from one thin QR, and Newton's method
solves there. NumPy in float64: in float32 a direction is right to a cosine of 0.999997 only (154
rows of 128 components), and INLP hands each error on to every later direction. Knows arrays only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from vauban._backend import one_blas_thread
from vauban.directions.estimators import Direction, check_labelled
from vauban.errors import InputError

KINDS = ("logistic", "svm", "lda")
_STEPS = 100


def fit_classifier(
    X: mx.array, y: mx.array, *, kind: Any = "logistic", C: float = 0.1, scale: float | None = None
) -> Direction:
    """Weights of a linear classifier of X (n, d) by y (n,) in {0, 1}, as a raw direction (d,).

    `kind`: "logistic" (L2-penalised, free bias), "svm" (squared hinge) or "lda" (shrunk
    within-class covariance; C is not used). X is divided by `scale` while fitting, so that one C
    fits the small norms of early layers and the large ones of late layers; None is the mean row
    norm over sqrt(d), 1.0 leaves X alone. The weights returned are in the units of X: 1 where
    w.x + bias > 0.

    Raises InputError for one class, wrong shapes or labels, NaN, C <= 0, an unknown kind.

    >>> import mlx.core as mx
    >>> X = mx.array([[0.0, 1], [1, 1], [4, 1], [5, 1]])
    >>> fitted = fit_classifier(X, mx.array([0, 0, 1, 1]), kind="svm")
    >>> (X @ fitted.vector + fitted.bias > 0).tolist()
    [False, False, True, True]
    """
    check_options(kind, C, scale)
    _, labels = check_labelled(X, y)
    rows = float64_rows(X)
    factor = row_scale(rows) if scale is None else scale
    span = span_of(rows / factor)
    with one_blas_thread():
        w, bias = solve(kind, span.coordinates, labels, C, span.d)
    vector = (span.lift(w) / factor).astype(np.float32)
    if not np.linalg.norm(vector) > 0:
        raise InputError(f"the {kind} classifier found no direction: the classes are equal")
    return Direction(mx.array(vector), bias, kind)


def float64_rows(X: mx.array) -> np.ndarray:
    """X (n, ..., d) in float64; InputError when it holds NaN or inf."""
    rows = np.array(X.astype(mx.float32), dtype=np.float64)
    if not np.isfinite(rows).all():
        raise InputError("X holds NaN or inf; expected finite activations")
    return rows


def check_options(kind: str, C: float, scale: float | None) -> None:
    """The arguments that classifiers share."""
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}; expected one of {KINDS}")
    if not C > 0 or not np.isfinite(C):
        raise InputError(f"C is {C}; expected a positive number")
    if scale is not None and (not scale > 0 or not np.isfinite(scale)):
        raise InputError(f"scale is {scale}; expected a positive number or None")


@dataclass(frozen=True, eq=False)
class Span:
    """Coordinates (n, r) of rows (n, d) in an orthonormal basis (r, d); None: r = d."""

    coordinates: np.ndarray
    basis: np.ndarray | None
    d: int

    def lift(self, v: np.ndarray) -> np.ndarray:
        """Coordinates (..., r) back to (..., d)."""
        return v if self.basis is None else v @ self.basis

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Coordinates of other rows; no classifier can read what lies outside the span."""
        return rows if self.basis is None else rows @ self.basis.T


def span_of(rows: np.ndarray) -> Span:
    """The span of float64 rows (n, d), by a thin QR of the transpose where n < d: O(n² d)."""
    n, d = rows.shape
    if n >= d:
        return Span(rows, None, d)
    q, r = np.linalg.qr(rows.T)
    return Span(r.T, q.T, d)


def row_scale(rows: np.ndarray) -> float:
    """Mean row norm over sqrt(d), so that a component of rows / scale is about 1.

    Residual norms grow some 40 times with depth, and C is in their units. Without the sqrt(d) rows
    would have norm 1, where C = 0.1 is so strong that every row stays inside the margin: the first
    classifier is then the mean difference exactly, and the second one zero (measured, d = 512).
    """
    scale = float(np.linalg.norm(rows, axis=-1).mean()) / rows.shape[-1] ** 0.5
    return scale if scale > 0 else 1.0


def solve(
    kind: str, x: np.ndarray, labels: np.ndarray, C: float, d: int | None = None
) -> tuple[np.ndarray, float]:
    """(w (r,), bias) of a classifier on coordinates x (n, r), bool labels (n,).

    w.x + bias > 0 says label 1.

    logistic  1/2 |w|² + C Σ log(1 + exp(-s(w.x + b))), b free (scikit-learn's objective)
    svm       1/2 (|w|² + b²) + C Σ max(0, 1 - s(w.x + b))² (LIBLINEAR's, which penalises b)
    lda       w = Σ_w⁻¹ (mean_1 - mean_0) with the shrunk within-class covariance; C is not used
    """
    sign = np.where(labels, 1.0, -1.0)
    if kind == "lda":
        return _discriminant(x, labels, d or x.shape[1])
    if kind == "logistic":
        return _newton(x, lambda z: _logistic(z, sign, C), bias_penalty=0.0)
    if kind == "svm":
        return _newton(x, lambda z: _squared_hinge(z, sign, C), bias_penalty=1.0)
    raise InputError(f"kind is {kind!r}; expected one of {KINDS}")


# Of scores z (n,): the summed loss, its first and its second derivative by each score.
Loss = Callable[[np.ndarray], tuple[float, np.ndarray, np.ndarray]]


def _logistic(z: np.ndarray, sign: np.ndarray, C: float) -> tuple[float, np.ndarray, np.ndarray]:
    margin = sign * z
    p = np.exp(-np.logaddexp(0.0, margin))
    return C * float(np.logaddexp(0.0, -margin).sum()), -C * sign * p, C * p * (1.0 - p)


def _squared_hinge(
    z: np.ndarray, sign: np.ndarray, C: float
) -> tuple[float, np.ndarray, np.ndarray]:
    short = np.maximum(0.0, 1.0 - sign * z)
    return C * float((short**2).sum()), -2.0 * C * sign * short, 2.0 * C * (short > 0)


def _newton(x: np.ndarray, loss: Loss, bias_penalty: float) -> tuple[np.ndarray, float]:
    """Newton with backtracking on 1/2 |w|² + penalty/2 b² + loss(x w + b)."""
    n, r = x.shape
    rows = np.hstack([x, np.ones((n, 1))])
    penalty = np.append(np.ones(r), bias_penalty)
    # Where the data are separable a free bias has no curvature of its own left.
    floor = np.append(np.zeros(r), 1e-12)
    point = np.zeros(r + 1)
    value, first, second = loss(rows @ point)
    start = None
    for _ in range(_STEPS):
        gradient = penalty * point + rows.T @ first
        length = float(np.linalg.norm(gradient))
        start = length if start is None else start
        if length <= 1e-10 * max(start, 1e-12):
            break
        hessian = rows.T @ (second[:, None] * rows) + np.diag(penalty + floor)
        step = np.linalg.solve(hessian, gradient)
        fall, t = float(gradient @ step), 1.0
        while True:
            moved = point - t * step
            summed, next_first, next_second = loss(rows @ moved)
            trial = summed + 0.5 * float((penalty * moved**2).sum())
            if trial <= value - 1e-4 * t * fall or t < 1e-10:
                break
            t *= 0.5
        if not trial < value:
            break
        point, value, first, second = moved, trial, next_first, next_second
    return point[:r], float(point[r])


def shrinkage(eigenvalues: np.ndarray, n: int, p: int) -> tuple[float, float]:
    """(a, b) of the optimal linear shrinkage a S + b I (Bodnar, Gupta and Parolya 2014).

    `eigenvalues` are those of the covariance S (divided by n) that are not zero, p its size. The
    intensity is clamped to [0, 1], which the estimator alone does not do.
    """
    trace, square = float(eigenvalues.sum()), float((eigenvalues**2).sum())
    bottom = square - trace**2 / p
    # A multiple of the identity is its own target: any intensity gives the same matrix.
    a = 0.0 if bottom <= 1e-12 * square else 1.0 - (trace**2 / n) / bottom
    a = min(max(a, 0.0), 1.0)
    return a, (1.0 - a) * trace / p


def _discriminant(x: np.ndarray, labels: np.ndarray, d: int) -> tuple[np.ndarray, float]:
    n = len(x)
    high, low = x[labels].mean(axis=0), x[~labels].mean(axis=0)
    inside = x - np.where(labels[:, None], high, low)
    _, s, vt = np.linalg.svd(inside, full_matrices=False)
    eigenvalues = s**2 / n
    a, b = shrinkage(eigenvalues, n, d)
    delta = high - low
    if b <= 0:
        # Unshrunk: the pseudo-inverse, blind to directions without any spread.
        kept = eigenvalues > 1e-12 * max(eigenvalues.max(), 1e-300)
        w = (vt[kept].T / eigenvalues[kept]) @ (vt[kept] @ delta)
    else:
        # (a S + b I)⁻¹ δ with S = Vᵀ diag(λ) V: 1/b outside the span of V.
        along = vt @ delta
        w = delta / b + vt.T @ ((1.0 / (a * eigenvalues + b) - 1.0 / b) * along)
    odds = np.log(labels.mean() / (1.0 - labels.mean()))
    return w, float(odds - w @ (high + low) / 2)
