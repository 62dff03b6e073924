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
    arXiv 2401.04700).

    >>> rect([[1.0, 1.0]], [[1.0, 10.0]], keep=0.5).tolist()
    [[1.0, 0.0]]
    """
    delta, w = _pair(update, weight)
    _share(keep, "keep")
    change = np.abs(delta / (w + 1e-8))
    bound = np.quantile(change, 1.0 - keep)
    return mx.array(np.where(change >= bound, delta, 0.0).astype(np.float32))


def prune(update: Any, weight: Any) -> mx.array:
    """The update of a whole sequence with its singular values above W's largest dampened.

    σ > m becomes ln σ - ln m + m, m the largest singular value of the unedited `weight` (Ma et al.
    2025, arXiv 2405.16821). Applied once, at the end, to W_T - W_0.
    """
    delta, w = _pair(update, weight)
    limit = np.linalg.norm(w, 2)
    left, values, right = np.linalg.svd(delta, full_matrices=False)
    large = values > limit
    values[large] = np.log(values[large]) - np.log(limit) + limit
    return mx.array(((left * values) @ right).astype(np.float32))


def sphere(update: Any, weight: Any, *, eta: float = 0.5, alpha: float = 0.5) -> mx.array:
    """Δ (I - α UᵀU): less of the update along the main directions of the weight's rows.

    U are the leading eigenvectors of W̄ᵀW̄, W̄ the weight with unit rows, that hold the share `eta`
    of its trace (SPHERE, ICLR 2026).
    """
    delta, w = _pair(update, weight)
    _share(eta, "eta")
    norms = np.linalg.norm(w, axis=1, keepdims=True)
    unit = w / np.where(norms > 0, norms, 1.0)
    values, vectors = np.linalg.eigh(unit.T @ unit)
    values, vectors = values[::-1], vectors[:, ::-1]
    count = int((np.cumsum(values) >= eta * values.sum() * (1 - 1e-12)).argmax()) + 1
    basis = vectors[:, :count]
    return mx.array((delta - alpha * (delta @ basis) @ basis.T).astype(np.float32))


def projected(update: Any, penalty: Penalty) -> mx.array:
    """Δ P (d1, d0): any method's update without what the penalty protects ("+P")."""
    delta = np.array(as_array(update, "update").astype(mx.float32))
    return mx.array(penalty.project(delta).astype(np.float32))


def _pair(update: Any, weight: Any) -> tuple[np.ndarray, np.ndarray]:
    delta = np.array(as_array(update, "update").astype(mx.float32), dtype=np.float64)
    w = np.array(as_array(weight, "weight").astype(mx.float32), dtype=np.float64)
    if delta.shape != w.shape or delta.ndim != 2:
        raise InputError(f"the update has shape {delta.shape}, the weight {w.shape}; expected one")
    return delta, w


def _share(value: float, name: str) -> None:
    if not 0 < value <= 1:
        raise InputError(f"{name} is {value}; expected 0 < {name} <= 1")
