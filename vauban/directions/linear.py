"""Penalised linear classifiers in a span: Newton's method over a stack of problems at once.

An L2-penalised weight vector lies in the span of the training rows, so a problem in d dimensions
is solved in at most n: the rows' coordinates in an orthonormal basis from one thin QR. Arrays are
float64 (b, n, r) on MLX's CPU stream, the only one that has float64; the problems of a stack share
their labels. Knows arrays only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from vauban.errors import InputError

KINDS = ("logistic", "svm", "lda")
_STEPS = 100
# In float32 a solution is 1.5 times cheaper, but its direction is right to a cosine of 0.999997
# only (n 154, r 128), and INLP hands each error on to all directions that follow.
FLOAT = mx.float64
_EPS = 2.2e-16
_BLOCK = 48


@dataclass(frozen=True, eq=False)
class Span:
    """Coordinates (b, n, r) of rows (b, n, d) in orthonormal bases (b, r, d); None: r = d."""

    coordinates: mx.array
    basis: mx.array | None
    d: int

    def lift(self, v: mx.array, problem: int) -> mx.array:
        """Coordinates (..., r) of one problem back to (..., d)."""
        return v if self.basis is None else mx.matmul(v, self.basis[problem], stream=mx.cpu)

    def of(self, rows: mx.array) -> mx.array:
        """Coordinates of other rows; what lies outside the span no classifier can read."""
        if self.basis is None:
            return rows
        return mx.matmul(rows, self.basis.swapaxes(1, 2, stream=mx.cpu), stream=mx.cpu)


def span_of(rows: mx.array) -> Span:
    """The spans of float64 rows (b, n, d) by a thin QR of each transpose, O(n² d)."""
    _, n, d = rows.shape
    if n >= d:
        return Span(rows, None, d)
    with mx.stream(mx.cpu):
        q, r = mx.linalg.qr(rows.swapaxes(1, 2))
        return Span(r.swapaxes(1, 2), q.swapaxes(1, 2), d)


def row_scale(rows: mx.array) -> mx.array:
    """(b,) mean row norm over sqrt(d) of rows (b, n, d), so that a component is then about 1.

    Residual norms grow some 40 times with depth, and C is in their units. Without the sqrt(d) rows
    would have norm 1, where C = 0.1 is so strong that every row stays inside the margin: the first
    classifier is then the mean difference exactly, and the second one zero (measured, d = 512).
    """
    with mx.stream(mx.cpu):
        scale = mx.linalg.norm(rows, axis=-1).mean(axis=-1) / rows.shape[-1] ** 0.5
        return mx.where(scale > 0, scale, 1.0)


def solve(
    kind: str, x: mx.array, labels: np.ndarray, C: float, d: int | None = None
) -> tuple[mx.array, mx.array]:
    """(w (b, r), bias (b,)) of classifiers on coordinates x (b, n, r), bool labels (n,).

    w.x + bias > 0 says label 1.

    logistic  1/2 |w|² + C Σ log(1 + exp(-s(w.x + b))), b free (scikit-learn's objective)
    svm       1/2 (|w|² + b²) + C Σ max(0, 1 - s(w.x + b))² (LIBLINEAR's, which penalises b)
    lda       w = Σ_w⁻¹ (mean_1 - mean_0) with the shrunk within-class covariance; C is not used
    """
    if kind == "lda":
        found = [_discriminant(np.array(one), labels, d or x.shape[2]) for one in x]
        return _float64([w for w, _ in found]), _float64([bias for _, bias in found])
    sign = _float64(np.where(labels, 1.0, -1.0))
    with mx.stream(mx.cpu):
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


def _float64(values: np.ndarray | list[np.ndarray] | list[float]) -> mx.array:
    return mx.array(np.asarray(values), dtype=FLOAT)


# Of scores z (b, n): the summed loss (b,), its first and its second derivative by each score.
Loss = Callable[[mx.array], tuple[mx.array, mx.array, mx.array]]


def _logistic(z: mx.array, sign: mx.array, C: float) -> tuple[mx.array, mx.array, mx.array]:
    margin = sign * z
    # MLX's exp (so sigmoid and logaddexp) has float32's precision in float64; tanh and log have
    # their own: 1 / (1 + e^-a) = (1 + tanh(a/2)) / 2, and log(1 + e^-m) = max(0, -m) - log σ(|m|).
    t = mx.tanh(0.5 * mx.abs(margin))
    loss = mx.maximum(0.0, -margin) - mx.log(0.5 + 0.5 * t)
    p = 0.5 - 0.5 * mx.where(margin > 0, t, -t)
    return C * loss.sum(axis=-1), -C * sign * p, 0.25 * C * (1.0 - t * t)


def _squared_hinge(z: mx.array, sign: mx.array, C: float) -> tuple[mx.array, mx.array, mx.array]:
    short = mx.maximum(0.0, 1.0 - sign * z)
    second = 2.0 * C * (short > 0).astype(FLOAT)
    return C * (short * short).sum(axis=-1), -2.0 * C * sign * short, second


def _newton(x: mx.array, loss: Loss, bias_penalty: float) -> tuple[mx.array, mx.array]:
    """Newton with backtracking on 1/2 |w|² + penalty/2 b² + loss(x w + b), x (b, n, r).

    A problem that has converged leaves the stack; the others go on. Each step factors one matrix of
    min(n, r) a side, and the Gram matrix of rows that are no more than dimensions is formed once.
    """
    stack, n, r = x.shape
    solutions = np.zeros((stack, r + 1))
    here = np.arange(stack)
    gram = x @ x.swapaxes(1, 2) if n <= r else None
    # A point is (w, b) as one row of r + 1, with its scores z = x w + b.
    point, z = mx.zeros((stack, r + 1), FLOAT), mx.zeros((stack, n), FLOAT)
    penalty = mx.concatenate([mx.ones((r,), FLOAT), mx.full((1,), bias_penalty, FLOAT)])

    def objective(point: mx.array, z: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        value, first, second = loss(z)
        return value + 0.5 * (penalty * point * point).sum(-1), first, second

    value, first, second = objective(point, z)
    start = stuck = None
    for _ in range(_STEPS):
        gradient = penalty * point + _with_sum(x, first)
        length = mx.linalg.norm(gradient, axis=-1)
        start = length if start is None else start
        ended = length <= 1e-10 * mx.maximum(start, 1e-12)
        done = np.array(ended if stuck is None else ended | stuck)
        if done.any():
            solutions[here[done]] = np.array(point)[done]
            here, left = here[~done], mx.array(np.flatnonzero(~done))
            if not here.size:
                break
            x, point, z, value, first, second, start, gradient = (
                a[left] for a in (x, point, z, value, first, second, start, gradient)
            )
            gram = None if gram is None else gram[left]
        if gram is None:
            step = _step(x, gradient, second, bias_penalty)
        else:
            step = _dual_step(x, gram, point, z, first, second, bias_penalty)
        along = _times(x, step[:, :r]) + step[:, r:]
        fall, t = (gradient * step).sum(-1), mx.ones(value.shape, FLOAT)
        while True:
            moved = point - t[:, None] * step, z - t[:, None] * along
            trial = objective(*moved)
            enough = (trial[0] <= value - 1e-4 * t * fall) | (t < 1e-10)
            if bool(enough.all()):
                break
            t = mx.where(enough, t, 0.5 * t)
        stuck = ~(trial[0] < value)
        point, z, value, first, second = (
            mx.where(stuck.reshape(-1, *[1] * (new.ndim - 1)), old, new)
            for old, new in zip((point, z, value, first, second), (*moved, *trial), strict=True)
        )
    else:
        solutions[here] = np.array(point)
    return _float64(solutions[:, :r]), _float64(solutions[:, r])


def _times(x: mx.array, w: mx.array) -> mx.array:
    """(b, n) products of rows x (b, n, r) with w (b, r)."""
    return (x @ w[..., None])[..., 0]


def _with_sum(x: mx.array, weights: mx.array) -> mx.array:
    """(b, r + 1) sums of the rows, and of the ones beside them, by weights (b, n)."""
    total = (weights[:, None] @ x)[:, 0]
    return mx.concatenate([total, weights.sum(-1, keepdims=True)], axis=-1)


def _step(x: mx.array, gradient: mx.array, second: mx.array, bias_penalty: float) -> mx.array:
    """H⁻¹ g (b, r + 1): A = I + xᵀ S x for the weights, the bias by its Schur complement."""
    r = x.shape[2]
    cross = _with_sum(x, second)
    scaled = mx.sqrt(second)[..., None] * x
    sides = mx.stack([gradient[:, :r], cross[:, :r]], axis=-1)
    solved = _solve_beside_one(scaled.swapaxes(1, 2) @ scaled, sides)
    u, v = solved[..., 0], solved[..., 1]
    # The free bias of separable data can leave its own entry at rounding level.
    own = mx.maximum(cross[:, r] + bias_penalty - (cross[:, :r] * v).sum(-1), 1e-12)
    by_bias = (gradient[:, r] - (cross[:, :r] * u).sum(-1)) / own
    return mx.concatenate([u - by_bias[:, None] * v, by_bias[:, None]], axis=-1)


def _dual_step(
    x: mx.array, gram: mx.array, point: mx.array, z: mx.array,
    first: mx.array, second: mx.array, bias_penalty: float,
) -> mx.array:  # fmt: skip
    """The same step where rows are no more than dimensions: n x n, and no product of matrices.

    At the new point w' = -xᵀ √S ψ, and (I + √S x xᵀ √S) ψ = f / √S - √S z + √S b', f the first
    derivatives; b' follows from Σ √S ψ + penalty b' = 0. Nothing large cancels, as it would in
    Woodbury's identity for A⁻¹, which loses its step for rows of norm 1e3 (measured).
    """
    # Every row keeps a trace of curvature; the step stays a descent, for f is not changed.
    q = mx.sqrt(mx.maximum(second, 1e-12 * mx.max(second, axis=-1, keepdims=True) + 1e-300))
    sides = mx.stack([first / q - q * z, q], axis=-1)
    solved = _solve_beside_one(q[..., None] * gram * q[:, None], sides)
    sums = (q[..., None] * solved).sum(axis=1)
    bias = -sums[:, :1] / (sums[:, 1:] + bias_penalty)
    w = _with_sum(x, -q * (solved[..., 0] + bias * solved[..., 1]))[:, :-1]
    return point - mx.concatenate([w, bias], axis=-1)


def _solve_beside_one(k: mx.array, sides: mx.array) -> mx.array:
    """(I + k)⁻¹ sides for positive semi-definite k (b, m, m), by Cholesky and blocks.

    MLX solves with a triangle by inverting it, which takes longer than the factor itself; with
    blocks of 48 on the diagonal inverted it takes a third (m = 205).
    """
    m = k.shape[-1]
    # Large rows round k by more than the identity is worth; a factor then needs this much more.
    ridge = 1.0 + _EPS * m * mx.diagonal(k, axis1=1, axis2=2).sum(-1)
    lower = mx.linalg.cholesky(k + ridge[:, None, None] * mx.eye(m, dtype=FLOAT))
    spans = [(at, min(at + _BLOCK, m)) for at in range(0, m, _BLOCK)]
    inverse = [mx.linalg.tri_inv(lower[:, a:b, a:b]) for a, b in spans]
    down: list[mx.array] = []
    for (a, b), own in zip(spans, inverse, strict=True):
        side = sides[:, a:b]
        if down:
            side = side - lower[:, a:b, :a] @ mx.concatenate(down, axis=1)
        down.append(own @ side)
    up: list[mx.array] = []
    for (a, b), own, side in reversed(list(zip(spans, inverse, down, strict=True))):
        if up:
            side = side - lower[:, b:, a:b].swapaxes(1, 2) @ mx.concatenate(up, axis=1)
        up.insert(0, own.swapaxes(1, 2) @ side)
    return mx.concatenate(up, axis=1)


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
