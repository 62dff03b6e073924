"""One parameter of two folders: equal, of another shape or type, or changed, and how.

Reads blocks of rows and hands them to `changes`; memory stays near one matrix. Judges nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import numpy as np

from vauban.comparison.adapter_terms import AddedTerm, FullValue
from vauban.comparison.changes import (
    COUNTED,
    Noise,
    Spectrum,
    leading_spectrum,
    numerical_rank,
    rank_of_share,
    strength_of_cut,
)
from vauban.comparison.stored_parameters import StoredParameter, matrices_of
from vauban.errors import ModelError

# Values of a block of rows, and of a change that is kept between passes.
_BLOCK, _KEPT = 1 << 22, 1 << 25
_TABLE = re.compile(r"embed|wte|wpe")
_BLOCK_INDEX = re.compile(r"\b(?:layers|h|blocks|block)\.(\d+)\.")
LEADING = 4

Edited = StoredParameter | AddedTerm | FullValue


@dataclass(frozen=True)
class MatrixChange:
    """A matrix, or one of a stack (`index`), or a vector (`rank` None), that changed.

    relative          ‖Δ‖/‖W‖
    rank              singular values above the rounding of the stored types, counted to 32
    low_rank          whether these and rounding are the whole change
    rank99            how many hold 99 % of ‖Δ‖²; None for more than 32
    rounding_share    the energy that rounding explains, as a share of ‖Δ‖²
    singular_values   the largest ones
    strength          α of W - α u(uᵀW) for the leading direction u
    alignment         cosine of what u was taken from and what was there: 1 for a cut
    writes            which side of Δ lies in the residual stream: "output", "input", "both" or ""
    """

    name: str
    index: int | None
    shape: tuple[int, ...]
    formats: tuple[str, str]
    relative: float
    rank: int | None
    low_rank: bool
    rank99: int | None
    rounding_share: float
    singular_values: tuple[float, ...]
    strength: float | None
    alignment: float | None
    writes: str
    left: np.ndarray = field(repr=False, compare=False)
    right: np.ndarray = field(repr=False, compare=False)

    @property
    def label(self) -> str:
        """Its name; an expert's with its number."""
        return self.name if self.index is None else f"{self.name}[{self.index}]"

    @property
    def block(self) -> int | None:
        """The block that it belongs to."""
        match = _BLOCK_INDEX.search(self.name)
        return int(match[1]) if match else None

    @property
    def is_table(self) -> bool:
        """Whether its rows, not its columns, are what is written to the stream."""
        return bool(_TABLE.search(self.name))

    @property
    def rounding_alone(self) -> bool:
        """Whether it is stored in another format, and rounding explains most of its change.

        Rows that repeat are rounded alike, so that the rank need not be 0.
        """
        return self.formats[0] != self.formats[1] and (
            self.rank is None or (self.low_rank and self.rounding_share >= 0.5)
        )

    @property
    def rank_words(self) -> str:
        if self.rank is None:
            return "–"
        return f"{self.rank}+" if self.rank >= COUNTED else str(self.rank)


def changes_of(
    base: StoredParameter, edited: Edited, d_model: int | None, seed: int = 0
) -> list[MatrixChange]:
    """The changed matrices of one parameter of equal shape; [] where all values are equal.

    Raises ModelError for NaN and inf.
    """
    if isinstance(edited, StoredParameter) and base.same_bytes(edited):
        return []
    places = matrices_of(base.shape)
    if not places:
        change = _vector(base, edited)
        return [change] if change else []
    found = []
    for number, (first, rows, columns) in enumerate(places):
        pair = _Pair(base, edited, first, rows, columns)
        change = _matrix(pair, number if len(places) > 1 else None, d_model, seed)
        found += [change] if change else []
    return found


@dataclass(eq=False)
class _Pair:
    """One matrix on both sides; its difference is kept between passes where that is small."""

    base: StoredParameter
    edited: Edited
    first: int
    rows: int
    columns: int
    kept: list[tuple[slice, np.ndarray]] = field(default_factory=list)

    def sides(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """(rows, W, Δ) block by block."""
        step = max(1, _BLOCK // max(self.columns, 1))
        for start in range(0, self.rows, step):
            stop = min(start + step, self.rows)
            span = self.first + start, self.first + stop
            before = self.base.rows(*span)
            if isinstance(self.edited, StoredParameter):
                delta = self.edited.rows(*span) - before
            else:
                delta = self.edited.added(*span, before)
            if not np.isfinite(delta).all():
                raise ModelError(f"{self.base.name} holds NaN or inf in one of the folders")
            yield slice(start, stop), before, delta

    def difference(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Δ block by block."""
        if self.kept:
            yield from self.kept
            return
        keep = self.rows * self.columns <= _KEPT
        for rows, _, delta in self.sides():
            if keep:
                self.kept.append((rows, delta))
            yield rows, delta

    def variances(self, rows: slice, before: np.ndarray, delta: np.ndarray) -> np.ndarray | None:
        """Of rounding, element by element: the coarser side's step squared over 12."""
        if not isinstance(self.edited, StoredParameter):
            return None
        span = self.first + rows.start, self.first + rows.stop
        steps = np.maximum(self.base.steps(before, *span), self.edited.steps(before + delta, *span))
        return np.square(steps) / np.float32(12.0)


def _vector(base: StoredParameter, edited: Edited) -> MatrixChange | None:
    count = prod(base.shape)
    pair = _Pair(base, edited, 0, 1, count)
    if not base.shape or base.packing is not None:
        pair = _Pair(base, edited, 0, 1, 1)
    _, before, delta = next(pair.sides())
    energy, size = _square(delta), _square(before)
    if energy == 0.0:
        return None
    none, relative = np.zeros((0, 0)), (energy / max(size, 1e-60)) ** 0.5
    return MatrixChange(
        base.name, None, base.shape, (base.format, edited.format), relative,
        None, False, None, 0.0, (), None, None, "", none, none,
    )  # fmt: skip


def _matrix(pair: _Pair, index: int | None, d_model: int | None, seed: int) -> MatrixChange | None:
    energy = size = 0.0
    by_row, by_column = np.zeros(pair.rows), np.zeros(pair.columns)
    pair.kept.clear()
    keep = pair.rows * pair.columns <= _KEPT
    for rows, before, delta in pair.sides():
        energy, size = energy + _square(delta), size + _square(before)
        if keep:
            pair.kept.append((rows, delta))
        variances = pair.variances(rows, before, delta)
        if variances is not None:
            by_row[rows] = variances.sum(axis=1, dtype=np.float64)
            by_column += variances.sum(axis=0, dtype=np.float64)
    if energy == 0.0:
        return None
    noise = Noise.of(by_row, by_column)
    spectrum = leading_spectrum(pair.difference, (pair.rows, pair.columns), seed=seed)
    rank, low_rank = numerical_rank(spectrum, energy, noise)
    name = pair.base.name
    table = bool(_TABLE.search(name))
    strength, alignment = _as_cut(pair, spectrum, table) if rank else (None, None)
    sides = [s for s, n in (("output", pair.rows), ("input", pair.columns)) if n == d_model]
    # A table's rows are what is written, whatever their number.
    sides = ["input"] if table and pair.columns == d_model else sides
    return MatrixChange(
        name=name,
        index=index,
        shape=(pair.rows, pair.columns),
        formats=(pair.base.format, pair.edited.format),
        relative=(energy / max(size, 1e-60)) ** 0.5,
        rank=rank,
        low_rank=low_rank,
        rank99=rank_of_share(spectrum, energy),
        rounding_share=min(1.0, noise.energy / energy),
        singular_values=tuple(float(v) for v in spectrum.values[:8]),
        strength=strength,
        alignment=alignment,
        writes="both" if len(sides) == 2 else "".join(sides),
        left=spectrum.left[: min(rank, LEADING)] if "output" in sides else np.zeros((0, 0)),
        right=spectrum.right[: min(rank, LEADING)] if "input" in sides else np.zeros((0, 0)),
    )


def _as_cut(pair: _Pair, spectrum: Spectrum, table: bool) -> tuple[float, float]:
    """(α, alignment) of the change along its leading output direction; a table's input one."""
    if table:
        v = spectrum.right[0].astype(np.float32)
        parts = [(before @ v, delta @ v) for _, before, delta in pair.sides()]
        return strength_of_cut(
            -np.concatenate([d for _, d in parts]), np.concatenate([w for w, _ in parts])
        )
    u = spectrum.left[0].astype(np.float32)
    had, taken = np.zeros(pair.columns, np.float32), np.zeros(pair.columns, np.float32)
    for rows, before, delta in pair.sides():
        had += u[rows] @ before
        taken -= u[rows] @ delta
    return strength_of_cut(taken, had)


def _square(values: np.ndarray) -> float:
    """‖A‖² in float64 sums of rows."""
    flat = np.ascontiguousarray(values, np.float32)
    return float(np.einsum("ij,ij->i", flat, flat).sum(dtype=np.float64))
