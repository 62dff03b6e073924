"""The second moment of a matrix's inputs, E[x xᵀ] ≈ FᵀF + diag(rest), from one pass over them.

F is a sketch by Frequent Directions (Liberty 2013, "Simple and deterministic matrix sketching"),
with what it leaves out of every coordinate's energy kept in `rest`: exact where the inputs have no
more coordinates than the sketch has rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vauban.errors import InputError


@dataclass(frozen=True, eq=False)
class Energy:
    """E[x xᵀ] ≈ `factor`ᵀ `factor` + diag(`rest`): factor (r, in), rest (in,), float32."""

    factor: np.ndarray
    rest: np.ndarray
    rows: int

    @property
    def mean(self) -> float:
        """Mean energy of a coordinate."""
        return float((np.vdot(self.factor, self.factor) + self.rest.sum()) / len(self.rest))

    def scaled(self, damping: float) -> tuple[np.ndarray, np.ndarray]:
        """(X, D) in float64 with H = XᵀX + diag(D) for a mean energy of 1, plus `damping`."""
        scale = 1.0 / max(self.mean, 1e-30)
        factor = self.factor.astype(np.float64) * np.sqrt(scale)
        diagonal: np.ndarray = self.rest.astype(np.float64) * scale + damping
        if not np.isfinite(factor).all() or not np.isfinite(diagonal).all():
            raise InputError("the second moment of a matrix's inputs holds NaN or inf")
        return factor, diagonal


class InputMoments:
    """Take in inputs (n, in) batch by batch; memory stays below 3 · `rank` rows.

    >>> x = np.random.default_rng(0).normal(size=(500, 8))
    >>> energy = InputMoments(8, 16).update(x).energy()
    >>> bool(np.allclose(energy.factor.T @ energy.factor, x.T @ x / 500, atol=1e-5))
    True
    """

    def __init__(self, size: int, rank: int) -> None:
        if rank < 1:
            raise InputError(f"rank is {rank}; expected at least 1")
        self.rank = rank
        self.rows = 0
        self._sketch = np.zeros((0, size), np.float32)
        self._squares = np.zeros(size)

    def update(self, rows: np.ndarray) -> InputMoments:
        """Add rows (n, in); raises InputError for another width, NaN or inf."""
        if rows.ndim != 2 or rows.shape[1] != len(self._squares):
            raise InputError(f"inputs have shape {rows.shape}; expected (n, {len(self._squares)})")
        if not np.isfinite(rows).all():
            raise InputError("the inputs of a matrix hold NaN or inf")
        self.rows += len(rows)
        self._squares += np.einsum("ni,ni->i", rows, rows, dtype=np.float64)
        for start in range(0, len(rows), self.rank):
            part = rows[start : start + self.rank].astype(np.float32)
            self._sketch = np.concatenate([self._sketch, part])
            if len(self._sketch) > 2 * self.rank:
                self._sketch = _shrunk(self._sketch, self.rank)
        return self

    def energy(self) -> Energy:
        """The means over everything taken in. Raises InputError for no rows."""
        if not self.rows:
            raise InputError("no inputs were read; expected at least one row")
        factor = _shrunk(self._sketch, self.rank)
        kept = np.einsum("ni,ni->i", factor, factor, dtype=np.float64)
        rest = np.maximum(self._squares - kept, 0) / self.rows
        factor = factor / np.float32(np.sqrt(self.rows))
        return Energy(factor, rest.astype(np.float32), self.rows)


def _shrunk(held: np.ndarray, rank: int) -> np.ndarray:
    """At most `rank` rows B with BᵀB as near to heldᵀ held as shrinking every direction allows."""
    if len(held) <= rank:
        return held
    wide = held.astype(np.float64)
    small = wide.shape[1] <= len(wide)
    values, vectors = np.linalg.eigh(wide.T @ wide if small else wide @ wide.T)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    shrink = values[rank] if len(values) > rank else 0.0
    kept = np.flatnonzero(values[:rank] > shrink)
    size = np.sqrt(values[kept] - shrink)
    # Of the Gram of the columns the eigenvectors are the directions themselves.
    unit = vectors[:, kept].T if small else (vectors[:, kept] / np.sqrt(values[kept])).T @ wide
    return (size[:, None] * unit).astype(np.float32)
