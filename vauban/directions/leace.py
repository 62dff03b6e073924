"""Least-squares concept erasure in closed form: two thin factors, never a d x d matrix.

LEACE (Belrose et al. 2023, arXiv 2306.03819), its kin SPLINCE and mean projection, and the oracle
that knows the labels. Knows arrays only; costs O(n² d) for n <= d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from vauban.directions.classifiers import float64_rows
from vauban.directions.classifiers import shrinkage as optimal_shrinkage
from vauban.errors import InputError


@dataclass(frozen=True, eq=False)
class LeaceResult:
    """An eraser r(x) = x - left (right (x - mean)): left (d, k), right (k, d), mean (d,).

    k is 1 for a binary concept, where `left` is parallel to the mean difference and only the
    read-out `right` knows the covariance. `shrinkage` is the weight of the sample covariance.

    >>> import mlx.core as mx
    >>> eraser = fit_leace(mx.array([[0.0, 1], [0, 3], [4, 1], [4, 3]]), mx.array([0, 0, 1, 1]))
    >>> eraser.rank, eraser.mean.tolist(), eraser(mx.array([0.0, 7.0])).tolist()
    (1, [2.0, 2.0], [2.0, 7.0])
    """

    left: mx.array
    right: mx.array
    mean: mx.array
    method: str = "leace"
    shrinkage: float = 1.0

    def __call__(self, x: mx.array) -> mx.array:
        """Erase x (..., d) in float32; returned in x's dtype."""
        h = x.astype(mx.float32)
        return (h - ((h - self.mean) @ self.right.T) @ self.left.T).astype(x.dtype)

    @property
    def rank(self) -> int:
        return int(self.left.shape[1])

    def summary(self) -> str:
        return f"{self.method} eraser of rank {self.rank}, d = {self.left.shape[0]}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "rank": self.rank,
            "d": int(self.left.shape[0]),
            "shrinkage": self.shrinkage,
        }


@dataclass(frozen=True, eq=False)
class OracleResult:
    """r(x, z) = x - slope (z - mean_z): the least change for those who know the label z."""

    slope: mx.array
    mean_z: mx.array

    def __call__(self, x: mx.array, y: mx.array) -> mx.array:
        """Erase x (n, d) with its labels y, given as they were for fitting."""
        z = mx.array(_concept(y, int(x.shape[0]), len(self.mean_z)).astype(np.float32))
        return (x.astype(mx.float32) - (z - self.mean_z) @ self.slope.T).astype(x.dtype)


@dataclass(frozen=True, eq=False)
class _Whitening:
    """Σ = a Xcᵀ Xc / n + b I through the right singular vectors V (r, d) of the centred rows."""

    v: np.ndarray
    variances: np.ndarray
    """(r,) eigenvalues of Σ on the span of V; b outside it."""
    a: float

    def half(self, columns: np.ndarray) -> np.ndarray:
        """Σ^{1/2}+ V-columns: (r, k) in V coordinates, whitened."""
        return columns / np.sqrt(self.variances)[:, None]

    def unhalf(self, columns: np.ndarray) -> np.ndarray:
        return columns * np.sqrt(self.variances)[:, None]


def _concept(y: mx.array, n: int, width: int | None = None) -> np.ndarray:
    """(n, k) float64 of the labels: one column for two classes, one-hot for more, Z as it is."""
    z = np.array(y.astype(mx.float32), dtype=np.float64)
    if z.shape[:1] != (n,) or z.ndim > 2:
        raise InputError(f"y has shape {z.shape}; expected ({n},) labels or ({n}, k) covariates")
    if not np.isfinite(z).all():
        raise InputError("y holds NaN or inf")
    if z.ndim == 2:
        return z
    classes = np.unique(z) if width is None else np.arange(max(width, 2))
    if width is None and (len(classes) < 2 or not np.array_equal(classes, np.arange(len(classes)))):
        raise InputError(f"labels {classes.tolist()[:5]}; expected 0, 1, ... with two or more")
    return z[:, None] if len(classes) == 2 else (z[:, None] == classes).astype(np.float64)


def _centred(X: mx.array, y: mx.array) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(rows, mean, z, mean z), rows and z centred."""
    if X.ndim != 2 or X.shape[0] < 2:
        raise InputError(f"X has shape {X.shape}; expected (n, d) with at least two rows")
    x = float64_rows(X)
    z = _concept(y, len(x))
    return x - x.mean(axis=0), x.mean(axis=0), z - z.mean(axis=0), z.mean(axis=0)


def _whitening(x: np.ndarray, shrink: bool) -> _Whitening:
    n, d = x.shape
    _, s, v = np.linalg.svd(x, full_matrices=False)
    kept = s > 1e-7 * max(float(s[0]), 1e-300)
    values = s[kept] ** 2 / n
    if not values.size:
        raise InputError("all rows of X are equal: there is nothing to erase")
    a, b = optimal_shrinkage(values, n, d) if shrink else (1.0, 0.0)
    return _Whitening(v[kept], a * values + b, a)


def _eraser(
    left: np.ndarray, right: np.ndarray, mean: np.ndarray, affine: bool, method: str, a: float
) -> LeaceResult:
    def single(values: np.ndarray) -> mx.array:
        return mx.array(values.astype(np.float32))

    about = mean if affine else np.zeros_like(mean)
    return LeaceResult(single(left), single(right), single(about), method, a)


def _columns(cross: np.ndarray, name: str) -> np.ndarray:
    """Orthonormal left singular vectors of a whitened cross-covariance (r, k) that count."""
    u, s, _ = np.linalg.svd(cross, full_matrices=False)
    if not s.size or s[0] <= 1e-9:
        raise InputError(f"X does not vary with {name}: the class means are equal")
    return u[:, s > 1e-3 * s[0]]


def fit_leace(
    X: mx.array, y: mx.array, *, shrinkage: bool = True, affine: bool = True
) -> LeaceResult:
    """The linear eraser of y that changes X least: no linear probe beats the majority after it.

    P = I - W⁺ U Uᵀ W with W = Σ^{-1/2} and U the left singular vectors of W Σ_xz (theorem 4.3);
    for two classes x - δ aᵀ(x - μ), a = Σ⁺δ / δᵀΣ⁺δ. `y` (n,) labels 0, 1, ... or (n, k)
    covariates. `shrinkage` regularises Σ (n < d needs it for unseen rows; guardedness on the rows
    themselves does not suffer). `affine=False` erases about zero instead of the mean.

    Raises InputError for one class, wrong shapes, NaN, or means that are equal.

    >>> import mlx.core as mx
    >>> X = mx.array([[0.0, 1], [0, 3], [4, 1], [4, 3]])
    >>> fit_leace(X, mx.array([0, 0, 1, 1]))(X).tolist()
    [[2.0, 1.0], [2.0, 3.0], [2.0, 1.0], [2.0, 3.0]]
    """
    x, mean, z, _ = _centred(X, y)
    white = _whitening(x, shrinkage)
    u = _columns(white.half(white.v @ (x.T @ z) / len(x)), "y")
    left = white.v.T @ white.unhalf(u)
    right = white.half(u).T @ white.v
    return _eraser(left, right, mean, affine, "leace", white.a)


def fit_splince(
    X: mx.array, y: mx.array, keep: mx.array, *, shrinkage: bool = True, affine: bool = True
) -> LeaceResult:
    """LEACE that leaves the covariance with a second label exactly as it was.

    SPLINCE (Holstege et al. 2025, arXiv 2506.10703): the oblique projection whose kernel holds
    Cov(x, y) and whose range holds Cov(x, keep). In whitened space, with A and B bases of the two
    covariances and N = A - B Bᵀ A, it is I - A (NᵀA)⁻¹ Nᵀ.

    Raises InputError when `keep` is, to X, the same label as `y`: then nothing can do both.

    >>> import mlx.core as mx
    >>> X = mx.random.normal((40, 5), key=mx.random.key(1))
    >>> y, keep = mx.arange(40) % 2, mx.arange(40) // 20
    >>> fit_splince(X, y, keep).rank
    1
    """
    x, mean, z, _ = _centred(X, y)
    kept = _concept(keep, len(x))
    kept = kept - kept.mean(axis=0)
    white = _whitening(x, shrinkage)
    cross = [white.half(white.v @ (x.T @ label) / len(x)) for label in (z, kept)]
    a, b = _columns(cross[0], "y"), _columns(cross[1], "keep")
    normal = a - b @ (b.T @ a)
    gram = normal.T @ normal
    least = float(np.linalg.eigvalsh(gram)[0])
    if least < 1e-6:
        raise InputError(
            f"y and keep share a direction in X (sine² of their angle {least:.1e}); erasing one "
            "while keeping the other is impossible"
        )
    left = white.v.T @ white.unhalf(a @ np.linalg.inv(gram))
    right = white.half(normal).T @ white.v
    return _eraser(left, right, mean, affine, "splince", white.a)


def fit_mean_projection(X: mx.array, y: mx.array, *, affine: bool = True) -> LeaceResult:
    """Orthogonal projection off the span of the class means (Haghighatkhah et al. 2022).

    For two classes this is ablation of the mean difference, about the overall mean when `affine`.
    It guards like LEACE and changes X (n, d) more; `y` as there.

    Raises InputError for one class, wrong shapes, NaN, or means that are equal.

    >>> import mlx.core as mx
    >>> X = mx.array([[0.0, 1], [0, 3], [4, 1], [4, 3]])
    >>> fit_mean_projection(X, mx.array([0, 0, 1, 1])).right.tolist()
    [[1.0, 0.0]]
    """
    x, mean, z, _ = _centred(X, y)
    u, s, _ = np.linalg.svd(x.T @ z / len(x), full_matrices=False)
    if s[0] <= 1e-9 * max(float(np.abs(mean).max()), 1e-300):
        raise InputError("X does not vary with y: the class means are equal")
    u = u[:, s > 1e-3 * s[0]]
    # Point from class 0 to class 1 where that has a meaning.
    u = u * np.where((x.T @ z[:, 0]) @ u < 0, -1.0, 1.0)
    return _eraser(u, u.T, mean, affine, "mean_projection", 1.0)


def fit_oracle(X: mx.array, y: mx.array) -> OracleResult:
    """x - Σ_xz Σ_zz⁺ (z - E z): the least change of all, for comparison (needs the labels).

    >>> import mlx.core as mx
    >>> X, y = mx.array([[0.0, 1], [0, 3], [4, 1], [4, 3]]), mx.array([0, 0, 1, 1])
    >>> fit_oracle(X, y)(X, y)[:, 0].tolist()
    [2.0, 2.0, 2.0, 2.0]
    """
    x, _, z, mean_z = _centred(X, y)
    slope = x.T @ z @ np.linalg.pinv(z.T @ z, rcond=1e-10)
    return OracleResult(mx.array(slope.astype(np.float32)), mx.array(mean_z.astype(np.float32)))
