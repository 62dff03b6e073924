"""Updates of one matrix from keys and residuals: ridge with history, ROME, EMMET.

W (d1, d0) maps a key k to W k. Facts are rows: keys K (u, d0), residuals R (u, d1), and an update
is Δ = Rᵀ B with B (u, d0), so its rank is at most u. Everything is solved in float64: in fact space
where facts are fewer than d0, in the space of the keys otherwise. Arrays only.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from vauban.errors import InputError
from vauban.knowledge.penalty import Penalty
from vauban.linalg import as_array


def ridge_update(
    keys: Any, residuals: Any, *, penalty: Penalty, past_keys: Any | None = None
) -> mx.array:
    """Δ = Rᵀ K (KᵀK + KpᵀKp + M)⁻¹ (d1, d0), the minimiser of ‖Δ Kᵀ - Rᵀ‖² + ‖Δ Kpᵀ‖² + tr ΔMΔᵀ.

    keys (u, d0), residuals (u, d1), past_keys (n, d0) of earlier edits, whose outputs are to stay.

    Raises InputError for shapes that do not fit, and for NaN or inf.

    >>> import mlx.core as mx
    >>> from vauban.knowledge import KeyStats, penalty
    >>> stats = KeyStats.from_moment(mx.eye(2), count=10, layer=0)
    >>> ridge_update([[1.0, 0.0]], [[2.0]], penalty=penalty(stats, "ridge", l2=1.0)).tolist()
    [[1.0, 0.0]]
    """
    k, r = _checked(keys, residuals, penalty)
    return mx.array((r.T @ ridge_rows(k, penalty, past_keys)).astype(np.float32))


def ridge_rows(
    keys: np.ndarray, penalty: Penalty, past_keys: Any | None = None, *, dense: bool | None = None
) -> np.ndarray:
    """B (u, d0) = K (KᵀK + KpᵀKp + M)⁻¹ in float64; `dense` chooses the space it is solved in."""
    u, size = keys.shape
    past = np.zeros((0, size)) if past_keys is None else _rows(past_keys, "past_keys", size)
    every = np.concatenate([past, keys])
    if dense is None:
        dense = len(every) > size
    inverse = penalty.inverse(np.eye(size) if dense else every)
    if dense:
        # M⁻¹(I + AᵀA M⁻¹)⁻¹: M itself may be infinite, its inverse is finite.
        system = np.eye(size) + every.T @ (every @ inverse)
        solved: np.ndarray = np.linalg.solve(system.T, (keys @ inverse).T).T
        return solved
    system = np.eye(len(every)) + inverse @ every.T
    wanted = np.zeros((len(every), u))
    wanted[len(past) :] = np.eye(u)
    rows: np.ndarray = np.linalg.solve(system.T, wanted).T @ inverse
    return rows


def rome_update(
    keys: Any, residuals: Any, *, penalty: Penalty, plain_keys: Any | None = None
) -> mx.array:
    """Δ = r (M⁻¹k)ᵀ / (kᵀM⁻¹k) (d1, d0): one fact, met exactly (Meng et al. 2022, 2202.05262).

    keys (d0,) or (1, d0), residuals (d1,) or (1, d1). M = C is `penalty(stats, "memit")` at any
    strength. `plain_keys` is the key that the published code has in the denominator, that of the
    prompt without a context.

    Raises InputError for more than one fact.

    >>> import mlx.core as mx
    >>> from vauban.knowledge import KeyStats, penalty
    >>> stats = KeyStats.from_moment(mx.eye(2), count=10, layer=0)
    >>> rome_update([2.0, 0.0], [6.0], penalty=penalty(stats, "memit", lam=1.0)).tolist()
    [[3.0, 0.0]]
    """
    k, r = _checked(keys, residuals, penalty)
    if len(k) != 1:
        raise InputError(f"ROME edits one fact at a time; {len(k)} are given (emmet takes several)")
    plain = k if plain_keys is None else _rows(plain_keys, "plain_keys", penalty.size)
    row = penalty.inverse(k)
    return mx.array((r.T @ (row / (row @ plain.T))).astype(np.float32))


def emmet_update(keys: Any, residuals: Any, *, penalty: Penalty, slack: float = 0.1) -> mx.array:
    """Δ = Rᵀ (K M⁻¹Kᵀ + slack I)⁻¹ K M⁻¹ (d1, d0): ROME for many facts (Gupta et al. 2024).

    keys (u, d0), residuals (u, d1). With slack 0 every fact is met exactly: Δ k = r. M is
    `penalty(stats, "encore")`, λC + λn I.

    Raises InputError for shapes that do not fit, and for NaN or inf.

    >>> import mlx.core as mx
    >>> from vauban.knowledge import KeyStats, penalty
    >>> stats = KeyStats.from_moment(mx.eye(2), count=10, layer=0)
    >>> rule = penalty(stats, "encore", lam=1.0, lam_n=1.0)
    >>> delta = emmet_update(mx.eye(2), [[3.0], [5.0]], penalty=rule, slack=0.0)
    >>> [round(v, 5) for v in delta[0].tolist()]
    [3.0, 5.0]
    """
    k, r = _checked(keys, residuals, penalty)
    inverse = penalty.inverse(k)
    gram = inverse @ k.T + slack * np.eye(len(k))
    return mx.array((r.T @ np.linalg.solve(gram, inverse)).astype(np.float32))


def _checked(keys: Any, residuals: Any, penalty: Penalty) -> tuple[np.ndarray, np.ndarray]:
    k, r = _rows(keys, "keys", penalty.size), _rows(residuals, "residuals")
    if len(k) != len(r):
        raise InputError(f"{len(k)} keys for {len(r)} residuals; expected one residual a key")
    return k, r


def _rows(values: Any, name: str, size: int | None = None) -> np.ndarray:
    """Finite rows (n, width) in float64."""
    if not isinstance(values, np.ndarray):
        values = np.array(as_array(values, name).astype(mx.float32))
    rows = np.atleast_2d(values).astype(np.float64)
    if rows.ndim != 2 or (size is not None and rows.shape[1] != size):
        raise InputError(f"{name} have shape {rows.shape}; expected (n, {size or 'd1'})")
    if not np.isfinite(rows).all():
        raise InputError(f"{name} hold NaN or inf")
    return rows
