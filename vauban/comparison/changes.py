"""How large a matrix's change is, of what rank, and along which directions: arrays alone.

Knows blocks of rows, as callers yield them; knows no file and no model. Singular values come from
a seeded randomized range finder (Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithm 4.4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

COUNTED = 32
"""A rank is counted up to here; a larger one is reported as "32 or more"."""
_OVERSAMPLING = 8
_EDGE = 2.0

Blocks = Callable[[], Iterator[tuple[slice, np.ndarray]]]
"""Yields (rows, the matrix's float32 rows) from the first to the last, anew at each call."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The largest singular values, and their vectors: left (k, m) and right (k, n) as unit rows."""

    values: np.ndarray
    left: np.ndarray
    right: np.ndarray


def leading_spectrum(
    blocks: Blocks, shape: tuple[int, int], *, count: int = COUNTED, seed: int = 0
) -> Spectrum:
    """The `count` largest singular values of a matrix (m, n) that is read four times by blocks.

    One power iteration over `count` + 8 seeded Gaussian probes. Values that stand out of a flat
    rest (a low-rank change over rounding) are within 1 % of the exact ones; those of a flat
    spectrum come out at most 20 % too small, never too large. Exact where min(m, n) <= count + 8.

    >>> matrix = np.outer([3.0, 0.0, 4.0], [1.0, 0.0])
    >>> found = leading_spectrum(lambda: iter([(slice(0, 3), matrix)]), (3, 2))
    >>> float(found.values[0].round(6)), abs(found.left[0]).round(6).tolist()
    (5.0, [0.6, 0.0, 0.8])
    """
    m, n = shape
    width = min(count + _OVERSAMPLING, m, n)
    probes = np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)
    basis = _orthonormal(_times(blocks, probes, m))
    probes = _orthonormal(_transposed_times(blocks, basis, n))
    basis = _orthonormal(_times(blocks, probes, m))
    small = _transposed_times(blocks, basis, n).T.astype(np.float64)
    left, values, right = np.linalg.svd(small, full_matrices=False)
    return Spectrum(values[:count], (basis @ left).T[:count], right[:count])


def _orthonormal(columns: np.ndarray) -> np.ndarray:
    return np.linalg.qr(columns)[0]


def _times(blocks: Blocks, right: np.ndarray, m: int) -> np.ndarray:
    product = np.empty((m, right.shape[1]), np.float32)
    for rows, part in blocks():
        product[rows] = part @ right
    return product


def _transposed_times(blocks: Blocks, left: np.ndarray, n: int) -> np.ndarray:
    product = np.zeros((n, left.shape[1]), np.float32)
    for rows, part in blocks():
        product += part.T @ left[rows]
    return product


@dataclass(frozen=True, eq=False)
class Noise:
    """What rounding to the stored format makes of a matrix: its energy and its largest value.

    With entries of independent variances v_ij the largest singular value stays near
    max_i sqrt(sum_j v_ij) + max_j sqrt(sum_i v_ij) (Bandeira and van Handel 2016,
    arXiv 1408.6185); `edge` is twice that, because the
    rounding errors of a change below one step are not independent.
    """

    energy: float
    edge: float

    @classmethod
    def of(cls, rows: np.ndarray, columns: np.ndarray) -> Noise:
        """From the variances' sums over each row and each column."""
        largest = np.sqrt(rows.max(initial=0.0)) + np.sqrt(columns.max(initial=0.0))
        return cls(float(rows.sum()), float(_EDGE * largest))


def numerical_rank(spectrum: Spectrum, energy: float, noise: Noise) -> tuple[int, bool]:
    """(singular values above the rounding, whether these and rounding are the whole change).

    `energy` is the change's squared Frobenius norm. What the counted values do not explain may be
    twice the rounding's energy and 1 % of the change.
    """
    size = energy**0.5
    rank = int((spectrum.values > max(noise.edge, 1e-5 * size)).sum())
    rest = energy - float((spectrum.values[:rank] ** 2).sum())
    return rank, rank < COUNTED and rest <= 2.0 * noise.energy + 0.01 * energy


def rank_of_share(spectrum: Spectrum, energy: float, share: float = 0.99) -> int | None:
    """The rank that holds a share of the change's energy; None where it is above the counted."""
    sums = np.cumsum(spectrum.values**2)
    reached = np.flatnonzero(sums >= share * energy)
    return int(reached[0]) + 1 if len(reached) else None


@dataclass(frozen=True, eq=False)
class SharedDirections:
    """Directions (s, d) that several changes share; `members` are their places, with cosines.

    A cosine is between the first direction and the span of a member's leading vectors, without a
    sign. `near` are the places of changes between 0.5 and 0.9.
    """

    directions: np.ndarray
    members: tuple[int, ...]
    cosines: tuple[float, ...]
    near: tuple[int, ...]


_SHARED, _NEAR, _MEAN = 0.9, 0.5, 0.8


def shared_directions(bases: Sequence[np.ndarray]) -> SharedDirections | None:
    """What the largest group of changes have in common; None for fewer than two.

    `bases` hold each change's leading vectors (k_i, d) as orthonormal rows. The direction v of a
    group is the top right singular vector of its stacked rows; members have ‖B_i v‖ >= 0.9. All
    directions along which the members' mean squared projection is at least 0.8 are shared.

    >>> same = np.array([[1.0, 0.0, 0.0]])
    >>> shared_directions([same, -same, np.array([[0.0, 1.0, 0.0]])]).members
    (0, 1)
    """
    members = list(range(len(bases)))
    for _ in range(8):
        if len(members) < 2:
            return None
        _, values, rows = np.linalg.svd(
            np.concatenate([bases[i] for i in members]), full_matrices=False
        )
        cosines = [float(np.linalg.norm(basis @ rows[0])) for basis in bases]
        ordered = [i for i, cosine in enumerate(cosines) if cosine >= _SHARED]
        if ordered == members:
            break
        members = ordered
    if len(members) < 2:
        return None
    shared = max(1, int((values**2 / len(members) >= _MEAN).sum()))
    near = (i for i, cosine in enumerate(cosines) if _NEAR <= cosine < _SHARED)
    return SharedDirections(
        rows[:shared], tuple(members), tuple(cosines[i] for i in members), tuple(near)
    )


def strength_of_cut(taken: np.ndarray, had: np.ndarray) -> tuple[float, float]:
    """(α, alignment) of a change that takes from uᵀW = `had` the row -uᵀΔ = `taken`.

    A cut W - α u(uᵀW) takes a multiple of what was there: alignment, a cosine, is 1. Of any other
    change along u it is about 0.

    >>> strength_of_cut(np.array([0.5, 1.0]), np.array([1.0, 2.0]))
    (0.5, 1.0)
    """
    inner, size = float(taken @ had), float(had @ had)
    both = (size * float(taken @ taken)) ** 0.5
    if both == 0.0:
        return 0.0, 0.0
    return inner / size, round(inner / both, 12)
