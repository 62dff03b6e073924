"""Penalised linear classifiers in a span: Newton's method in float64. Knows arrays only.

An L2-penalised weight vector lies in the span of the training rows, so a problem in d dimensions
is solved in at most n: the rows' coordinates in an orthonormal basis from one thin QR.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vauban.errors import InputError

KINDS = ("logistic", "svm", "lda")
_STEPS = 100


@dataclass(frozen=True, eq=False)
class Span:
    """Coordinates (n, r) of rows (n, d) in an orthonormal basis (r, d); None stands for r = d."""

    coordinates: np.ndarray
    basis: np.ndarray | None
    d: int

    def lift(self, v: np.ndarray) -> np.ndarray:
        """Coordinates (..., r) back to (..., d)."""
        return v if self.basis is None else v @ self.basis

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Coordinates of other rows; what lies outside the span no classifier can read."""
        return rows if self.basis is None else rows @ self.basis.T


def span_of(rows: np.ndarray) -> Span:
    """The span of float64 rows (n, d) by a thin QR of their transpose, O(n² d)."""
    n, d = rows.shape
    if n >= d:
        return Span(rows, None, d)
    q, r = np.linalg.qr(rows.T)
    return Span(np.ascontiguousarray(r.T), np.ascontiguousarray(q.T), d)


def row_scale(rows: np.ndarray) -> float:
    """Mean row norm over sqrt(d), so that a component is about 1 after division.

    Residual norms grow some 40 times with depth, and C is in their units. Without the sqrt(d) rows
    would have norm 1, where C = 0.1 is so strong that every row stays inside the margin: the first
    classifier is then the mean difference exactly, and the second one zero (measured, d = 512).
    """
    scale = float(np.linalg.norm(rows, axis=-1).mean()) / rows.shape[-1] ** 0.5
    if not np.isfinite(scale):
        raise InputError("X holds NaN or inf; expected finite activations")
    return scale or 1.0


def solve(
    kind: str, x: np.ndarray, labels: np.ndarray, C: float, d: int | None = None
) -> tuple[np.ndarray, float]:
    """(w (r,), b) of one classifier on coordinates x (n, r) and bool labels; w.x + b > 0 is 1.

    logistic  1/2 |w|² + C Σ log(1 + exp(-s(w.x + b))), b free (scikit-learn's objective)
    svm       1/2 (|w|² + b²) + C Σ max(0, 1 - s(w.x + b))² (LIBLINEAR's, which penalises b)
    lda       w = Σ_w⁻¹ (mean_1 - mean_0) with the shrunk within-class covariance; C is not used
    """
    if kind == "lda":
        return _discriminant(x, labels, d or x.shape[1])
    sign = np.where(labels, 1.0, -1.0)
    if kind == "logistic":
        return _newton(x, lambda z: _logistic(z, sign, C), 0.0)
    if kind == "svm":
        return _newton(x, lambda z: _squared_hinge(z, sign, C), 1.0)
    raise InputError(f"kind is {kind!r}; expected one of {KINDS}")


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


def _logistic(z: np.ndarray, sign: np.ndarray, C: float) -> tuple[float, np.ndarray, np.ndarray]:
    margin = sign * z
    loss = np.logaddexp(0.0, -margin).sum()
    p = np.exp(-np.logaddexp(0.0, margin))
    return C * float(loss), -C * sign * p, C * p * (1.0 - p)


def _squared_hinge(
    z: np.ndarray, sign: np.ndarray, C: float
) -> tuple[float, np.ndarray, np.ndarray]:
    short = np.maximum(0.0, 1.0 - sign * z)
    return C * float((short**2).sum()), -2.0 * C * sign * short, 2.0 * C * (short > 0)


Loss = Callable[[np.ndarray], tuple[float, np.ndarray, np.ndarray]]


def _newton(x: np.ndarray, loss: Loss, bias_penalty: float) -> tuple[np.ndarray, float]:
    """Newton with backtracking on 1/2 |w|² + penalty/2 b² + loss(x w + b).

    `loss` returns its value and its first and second derivative by each row's score.
    """
    n, r = x.shape
    rows = np.concatenate([x, np.ones((n, 1))], axis=1)
    penalty = np.concatenate([np.ones(r), [bias_penalty]])
    w = np.zeros(r + 1)

    def objective(w: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        value, first, second = loss(rows @ w)
        return value + 0.5 * float(penalty @ w**2), first, second

    value, first, second = objective(w)
    start = None
    for _ in range(_STEPS):
        gradient = rows.T @ first + penalty * w
        size = float(np.linalg.norm(gradient))
        start = start or size
        if size <= 1e-10 * max(start, 1e-12):
            break
        hessian = (rows * second[:, None]).T @ rows
        hessian[np.diag_indices(r + 1)] += penalty
        # The free bias of separable data can leave its own entry at rounding level.
        hessian[r, r] += 1e-12
        step = np.linalg.solve(hessian, gradient)
        fall, t = float(gradient @ step), 1.0
        while True:
            candidate = w - t * step
            trial = objective(candidate)
            if trial[0] <= value - 1e-4 * t * fall or t < 1e-10:
                break
            t *= 0.5
        if trial[0] >= value:
            break
        w, (value, first, second) = candidate, trial
    return w[:r], float(w[r])


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
