"""Null-space protection: change a matrix only where the inputs to be preserved do not look.

For keys K (n, in), the inputs of that very matrix, ΔW P with P = I - V^T V leaves
(W + ΔW P) k = W k for every k in the span of V (AlphaEdit's idea, arXiv 2410.02355, applied to a
cut). Arrays only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from vauban._common import RELATIVE_NOISE
from vauban.edits.lowrank import share
from vauban.edits.options import finite, whole
from vauban.errors import InputError
from vauban.linalg import as_array

DEFAULT_ENERGY = 0.999
# How many times as long as the removed row the fitted one may be.
DEFAULT_LIMIT = 4.0


@dataclass(frozen=True, eq=False)
class NullSpace:
    """`basis` (r, in) row-orthonormal: what is preserved; all `singular_values` of the keys.

    >>> import mlx.core as mx
    >>> space = null_space(mx.array([[3.0, 4.0, 0.0]]), rank=1)
    >>> space.rank, [round(abs(v), 6) for v in space.basis[0].tolist()]
    (1, [0.6, 0.8, 0.0])
    """

    basis: mx.array
    singular_values: mx.array

    @property
    def rank(self) -> int:
        return int(self.basis.shape[0])

    def project(self, rows: Any) -> mx.array:
        """rows - (rows Vᵀ) V, in two passes (float32 leaves half as much): (..., in)."""
        x = as_array(rows, "rows").astype(mx.float32)
        if x.ndim == 0 or x.shape[-1] != self.basis.shape[1]:
            raise InputError(f"rows have shape {x.shape}; expected (..., {self.basis.shape[1]})")
        for _ in range(2):
            x = x - (x @ self.basis.T) @ self.basis
        return x

    def summary(self) -> str:
        return f"null space of {self.rank} preserved directions of {self.basis.shape[1]}"

    def to_dict(self) -> dict[str, Any]:
        return {"rank": self.rank, "d_in": int(self.basis.shape[1])}


@dataclass(frozen=True, eq=False)
class Keys:
    """The inputs of one matrix as a triangular factor: `factor` (m, in) has KᵀK = factorᵀfactor.

    `counted` is the factor of the rows that count towards the energy: all but attention sinks.
    """

    factor: mx.array
    counted: mx.array
    rows: int


class KeyAccumulator:
    """Take in the inputs of a matrix batch by batch; memory stays below 2 · in².

    Rows are stacked on the factor so far and a QR keeps its triangle: KᵀK is never formed, whose
    float32 form loses every direction below 3e-4 of the largest.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.rows = 0
        self._factors: dict[str, list[np.ndarray]] = {"all": [], "counted": []}

    def update(self, rows: Any, counted: mx.array | None = None) -> KeyAccumulator:
        """Add rows (n, in); `counted` (n,) bool marks those that count as energy (default all)."""
        rows = as_array(rows, "keys")
        if rows.ndim != 2 or rows.shape[1] != self.size:
            raise InputError(f"keys have shape {rows.shape}; expected (n, {self.size})")
        k = np.array(rows.astype(mx.float32))
        if not np.isfinite(k).all():
            raise InputError("keys hold NaN or inf")
        mask = np.ones(len(k), bool) if counted is None else np.array(counted).astype(bool)
        self.rows += len(k)
        for name, part in (("all", k), ("counted", k[mask])):
            parts = self._factors[name]
            parts.append(part)
            if sum(len(p) for p in parts) > 2 * self.size:
                parts[:] = [np.asarray(np.linalg.qr(np.concatenate(parts), mode="r"))]
        return self

    def keys(self) -> Keys:
        """The factors of everything taken in."""
        if not self.rows:
            raise InputError("no keys were collected; expected at least one row")
        stacked = {
            name: np.concatenate(parts) if parts else np.zeros((0, self.size), np.float32)
            for name, parts in self._factors.items()
        }
        return Keys(mx.array(stacked["all"]), mx.array(stacked["counted"]), self.rows)


def null_space(keys: Any, *, energy: float | None = None, rank: int | None = None) -> NullSpace:
    """The directions of `keys` (n, in), or of collected `Keys`, to preserve: by energy or number.

    Never centred: the common mean of the inputs is what must be preserved first. `energy` in
    (0, 1] keeps the fewest singular directions that hold that share of the squared norm of the
    counted rows (default 0.999); 1.0 keeps every direction above rounding. HIGHER energy
    preserves MORE. `rank` keeps a number. SVD in float64.

    Raises InputError for both options at once, empty or non-finite keys, and where every
    direction of the input would be preserved, because nothing could then be changed.

    >>> import mlx.core as mx
    >>> space = null_space(mx.array([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), energy=1.0)
    >>> space.project(mx.array([1.0, 1.0, 1.0])).tolist()
    [0.0, 0.0, 1.0]
    """
    if energy is not None and rank is not None:
        raise InputError("give energy or rank, not both")
    if not isinstance(keys, Keys):
        keys = as_array(keys, "keys")
        if keys.ndim != 2 or keys.size == 0:
            raise InputError(f"keys have shape {keys.shape}; expected (n, in), not empty")
        keys = KeyAccumulator(int(keys.shape[1])).update(keys).keys()
    k = np.array(keys.factor, dtype=np.float64)
    size = k.shape[1]
    values, basis = np.linalg.svd(k, full_matrices=False)[1:]
    if values.size == 0 or values[0] <= 0:
        raise InputError("the keys are all zero; there is nothing to preserve")
    real = int((values > RELATIVE_NOISE * values[0]).sum())
    if rank is not None:
        chosen = min(whole(rank, "rank"), real)
        if chosen < 1:
            raise InputError(f"rank is {rank}; expected at least 1")
    else:
        share = DEFAULT_ENERGY if energy is None else finite(energy, "energy")
        if not 0.0 < share <= 1.0:
            raise InputError(f"energy is {share}; expected 0 < e <= 1")
        counted = np.array(keys.counted, dtype=np.float64)
        energies = ((counted @ basis.T) ** 2).sum(0) if len(counted) else values**2
        total = energies[:real].sum()
        # 1.0 is every direction, whatever rounding makes of the last sum.
        chosen = real
        if share < 1.0 and total > 0:
            chosen = int(np.searchsorted(np.cumsum(energies[:real]) / total, share) + 1)
        chosen = min(chosen, real)
    if chosen >= size:
        raise InputError(
            f"the keys span all of their space (r = {chosen}, d_in = {size}): nothing could be "
            "changed; take fewer prompts, a lower energy or a rank"
        )
    return NullSpace(
        mx.array(basis[:chosen].astype(np.float32)), mx.array(values.astype(np.float32))
    )


def least_squares_rows(
    removed: mx.array,
    space: NullSpace,
    targets: mx.array,
    ridge: float = 1e-3,
    limit: float = DEFAULT_LIMIT,
) -> mx.array:
    """The rows q = P q to take out that best remove the direction from `targets`.

    Projecting the removed row r keeps the guarantee but may leave the concept on the very inputs
    that carry it, where P r and r are different functions. Ridge regression inside the null space
    asks q.x = r.x on the target inputs x: min_q |X (r - q)|² + λ|q|², so that
    q = P Xᵀ (X P Xᵀ + λI)^-1 X r. The guarantee is the same. removed (k, in), targets (m, in), of
    which only XᵀX matters (a triangular factor serves); returns (k, in).

    λ is `ridge` times the mean eigenvalue of XᵀX, the targets as they are: measured on what the
    null space leaves of them, it would vanish with it, and q grow without bound where targets are
    (nearly) preserved inputs. Where |q| > limit |r| all the same, λ is quadrupled until it is not:
    what other inputs may meet is at most `limit` times what a plain cut takes from them. Targets
    that are all zero ask for nothing: P r.
    """
    raw = np.array(targets.astype(mx.float32), dtype=np.float64)
    size = raw.shape[1]
    strength = ridge * float((raw**2).sum()) / size
    if strength == 0.0:
        return space.project(removed)
    r = np.array(removed.astype(mx.float32), dtype=np.float64)
    x = np.array(space.project(targets), dtype=np.float64)
    wanted = raw @ r.T
    # Xᵀ(XXᵀ + λI)^-1 = (XᵀX + λI)^-1 Xᵀ: the smaller of the two is solved.
    few = len(x) <= size
    gram, right = (x @ x.T, wanted) if few else (x.T @ x, x.T @ wanted)
    taken = np.zeros_like(r)
    open_rows = np.arange(len(r))
    while open_rows.size:
        solution = np.linalg.solve(gram + strength * np.eye(len(gram)), right[:, open_rows])
        q = (x.T @ solution if few else solution).T
        short = np.linalg.norm(q, axis=1) <= limit * np.linalg.norm(r[open_rows], axis=1)
        taken[open_rows[short]] = q[short]
        open_rows = open_rows[~short]
        strength *= 4
    return space.project(mx.array(taken.astype(np.float32)))


def leak(removed: mx.array, taken: mx.array, keys: Sequence[mx.array] | mx.array) -> float:
    """max |K takenᵀ| / max |K removedᵀ|: what preserved inputs still lose, against a plain cut."""
    k = keys if isinstance(keys, mx.array) else mx.concatenate(list(keys))
    before = float(mx.abs(k @ removed.T).max())
    return share(float(mx.abs(k @ taken.T).max()), before)


def mean_leak(
    removed: Sequence[mx.array], taken: Sequence[mx.array], keys: Sequence[Keys | None]
) -> float:
    """‖K takenᵀ‖/‖K removedᵀ‖ over all keys of a matrix, or of its experts (None: no keys).

    `leak` in the root mean square over the rows, which is what their triangular factor keeps.
    """
    before = after = 0.0
    for r, q, k in zip(removed, taken, keys, strict=True):
        if k is not None:
            before += float(((k.factor @ r.T) ** 2).sum())
            after += float(((k.factor @ q.T) ** 2).sum())
    return share(after, before) ** 0.5


def removable_share(removed: mx.array, taken: mx.array) -> float:
    """‖taken‖² / ‖removed‖²: the share of the cut that the protection lets through."""
    had = float((removed.astype(mx.float32) ** 2).sum())
    return share(float((taken.astype(mx.float32) ** 2).sum()), had)
