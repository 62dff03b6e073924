"""The second moment of a matrix's inputs, E[x xᵀ] ≈ FᵀF + diag(rest), from one pass over them.

F is a sketch by Frequent Directions (Liberty 2013, "Simple and deterministic matrix sketching"),
with what it leaves out of every coordinate's energy kept in `rest`: exact where the inputs have no
more coordinates than the sketch has rows. NumPy only; sees no model.
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
        self._held = np.zeros((0, size), np.float32)
        # Where the sketch would hold everything the sum itself is no larger, and is exact.
        self._sum = np.zeros((size, size)) if size <= rank else None
        self._square = np.zeros(size)

    def update(self, rows: np.ndarray) -> InputMoments:
        """Add rows (n, in); raises InputError for another width, NaN or inf."""
        if rows.ndim != 2 or rows.shape[1] != len(self._square):
            raise InputError(f"inputs have shape {rows.shape}; expected (n, {len(self._square)})")
        if not np.isfinite(rows).all():
            raise InputError("the inputs of a matrix hold NaN or inf")
        self.rows += len(rows)
        self._square += np.einsum("ni,ni->i", rows, rows, dtype=np.float64)
        if self._sum is not None:
            # Few large products: on CPUs the threads of NumPy's BLAS and of mlx's get in each
            # other's way every time that the one follows the other.
            self._held = np.concatenate([self._held, rows.astype(np.float32)])
            if len(self._held) > 2 * self.rank:
                self._add_held()
            return self
        for start in range(0, len(rows), self.rank):
            part = rows[start : start + self.rank].astype(np.float32)
            self._held = np.concatenate([self._held, part])
            if len(self._held) > 2 * self.rank:
                self._held = _sketch(self._held, self.rank)
        return self

    def energy(self) -> Energy:
        """The means over everything taken in. Raises InputError for no rows."""
        if not self.rows:
            raise InputError("no inputs were read; expected at least one row")
        self._add_held()
        factor = _sketch(self._held, self.rank) if self._sum is None else _root(self._sum)
        rest = np.maximum(self._square - np.einsum("ni,ni->i", factor, factor, dtype=np.float64), 0)
        scale = 1.0 / self.rows
        return Energy(
            (factor * np.sqrt(scale)).astype(np.float32),
            (rest * scale).astype(np.float32),
            self.rows,
        )

    def _add_held(self) -> None:
        """Take the rows held so far into the sum, where there is one."""
        if self._sum is not None and len(self._held):
            wide = self._held.astype(np.float64)
            self._sum += wide.T @ wide
            self._held = self._held[:0]


def _root(total: np.ndarray) -> np.ndarray:
    """B with BᵀB = `total`, a sum of x xᵀ."""
    values, vectors = np.linalg.eigh(total)
    return (np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T).astype(np.float32)


def _sketch(held: np.ndarray, rank: int) -> np.ndarray:
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
