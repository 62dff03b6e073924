"""What is done to an update after it is solved: RECT, PRUNE, SPHERE, projection. Arrays only."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from vauban.errors import InputError
from vauban.knowledge.penalty import Penalty
from vauban.linalg import as_array


def rect(update: Any, weight: Any, *, keep: float = 0.4) -> mx.array:
    """The update (d1, d0) where it changes `weight` most, relatively; zero elsewhere.

    The share `keep` of the entries with the largest |Δ/(W + 1e-8)| stays (Gu et al. 2024,
    arXiv 2401.04700). Raises InputError for unequal shapes, and a share outside (0, 1].

    >>> rect([[1.0, 1.0]], [[1.0, 10.0]], keep=0.5).tolist()
    [[1.0, 0.0]]
    """
    delta, w = _pair(update, weight)
    _share(keep, "keep")
    change = np.abs(delta / (w + 1e-8))
    bound = np.quantile(change, 1.0 - keep)
    return mx.array(np.where(change >= bound, delta, 0.0).astype(np.float32))


def prune(update: Any, weight: Any) -> mx.array:
    """The update (d1, d0) of a sequence with its singular values above W's largest dampened.

    σ > m becomes ln σ - ln m + m, m the largest singular value of the unedited `weight` (Ma et al.
    2025, arXiv 2405.16821). Applied once, at the end, to W_T - W_0. Raises InputError for other
    shapes than one.

    >>> update = prune([[8.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 1.0]])  # ln 8 - ln 2 + 2
    >>> [[round(v, 3) for v in row] for row in update.tolist()]
    [[3.386, 0.0], [0.0, 1.0]]
    """
    delta, w = _pair(update, weight)
    limit = np.linalg.norm(w, 2)
    left, values, right = np.linalg.svd(delta, full_matrices=False)
    large = values > limit
    values[large] = np.log(values[large]) - np.log(limit) + limit
    return mx.array(((left * values) @ right).astype(np.float32))


def sphere(update: Any, weight: Any, *, eta: float = 0.5, alpha: float = 0.5) -> mx.array:
    """Δ (I - α UᵀU), (d1, d0): less of the update along the main directions of the weight's rows.

    U are the leading eigenvectors of W̄ᵀW̄, W̄ the weight with unit rows, that hold the share `eta`
    of its trace (SPHERE, ICLR 2026). Raises InputError for unequal shapes, eta outside (0, 1].

    >>> update = sphere([[4.0, 6.0]], [[5.0, 0.0]])  # the weight's only direction is the first
    >>> [round(v, 5) for v in update[0].tolist()]
    [2.0, 6.0]
    """
    delta, w = _pair(update, weight)
    _share(eta, "eta")
    basis = _main_rows(w, eta)
    return mx.array((delta - alpha * (delta @ basis) @ basis.T).astype(np.float32))


def projected(update: Any, penalty: Penalty) -> mx.array:
    """Δ P (d1, d0): any method's update without what the penalty protects ("+P")."""
    delta = np.array(as_array(update, "update").astype(mx.float32))
    return mx.array(penalty.project(delta).astype(np.float32))


def filtered(
    name: str, residuals: np.ndarray, rows: np.ndarray, weight: Any, protected: Any | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The factors of an update Δ = Rᵀ B, R (u, d1) and B (u, d0), after the filter `name`.

    "sphere" and "project" act on B. "rect" leaves no thin factors: the identity and Δ are given.
    `protected` (r, d0) is a row-orthonormal basis, for "project".
    """
    if name == "project":
        basis = np.asarray(as_array(protected, "protected").astype(mx.float32), np.float64)
        return residuals, rows - (rows @ basis.T) @ basis
    if name == "sphere":
        w = np.array(as_array(weight, "weight").astype(mx.float32), dtype=np.float64)
        basis = _main_rows(w, 0.5)
        return residuals, rows - 0.5 * (rows @ basis) @ basis.T
    delta = np.array(rect(residuals.T @ rows, weight), dtype=np.float64)
    return np.eye(len(delta)), delta


def _main_rows(w: np.ndarray, eta: float) -> np.ndarray:
    """(d0, r) the leading eigenvectors of W̄ᵀW̄ with the share `eta` of its trace."""
    norms = np.linalg.norm(w, axis=1, keepdims=True)
    unit = w / np.where(norms > 0, norms, 1.0)
    values, vectors = np.linalg.eigh(unit.T @ unit)
    values, vectors = values[::-1], vectors[:, ::-1]
    count = int((np.cumsum(values) >= eta * values.sum() * (1 - 1e-12)).argmax()) + 1
    return vectors[:, :count]


def _pair(update: Any, weight: Any) -> tuple[np.ndarray, np.ndarray]:
    delta = np.array(as_array(update, "update").astype(mx.float32), dtype=np.float64)
    w = np.array(as_array(weight, "weight").astype(mx.float32), dtype=np.float64)
    if delta.shape != w.shape or delta.ndim != 2:
        raise InputError(f"the update has shape {delta.shape}, the weight {w.shape}; expected one")
    return delta, w


def _share(value: float, name: str) -> None:
    if not 0 < value <= 1:
        raise InputError(f"{name} is {value}; expected 0 < {name} <= 1")
