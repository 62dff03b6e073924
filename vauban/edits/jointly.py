"""Round the codes of one column, or row, together: to the nearest, and U (s·q) + const to zero.

A root of the staircase, then single steps. NumPy only; sees p problems of m codes each.
"""

from __future__ import annotations

import numpy as np

from vauban.edits.grids import Grid
from vauban.edits.mending import approach, combine, enough, mend, pair
from vauban.edits.staircase import inverse, joint_root, root

# Rows that carry far more of u than the rest are rounded first and never moved: their steps are
# coarser than the error to be mended.
_HEAVY = 8.0
# Among more codes than this single steps close any gap as cheaply as combinations do.
_COMBINED = 2048


def round_jointly(
    x: np.ndarray, step: np.ndarray, u: np.ndarray, const: np.ndarray, grid: Grid,
    start: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Grid indices (p, m) uint8 with U (s·q) + const = 0 in each problem.

    x (p, m) wanted codes; step (1 or p, m); u (k, m); const (k, p); start (k, p) a shift to begin
    from, which the frozen rows are rounded with.
    """
    fixed = _heavy(u) | ~u.any(0)
    index = np.empty(x.shape, dtype=np.uint8)
    const = np.array(const, dtype=np.float64)
    if fixed.any():
        there = x[:, fixed].copy()
        if start is not None:
            there += (start.T @ u[:, fixed]) * inverse(step[:, fixed])
        index[:, fixed] = grid.round(there, out=there)
        value = grid.value(there).astype(np.float64) * step[:, fixed]
        const = const + u[:, fixed].astype(np.float64) @ value.T
        if fixed.all():
            return index
        x, step, u = x[:, ~fixed], step[:, ~fixed], u[:, ~fixed]
    index[:, ~fixed if fixed.any() else slice(None)] = _free(x, step, u, const, grid, start)
    return index


def _free(
    x: np.ndarray, step: np.ndarray, u: np.ndarray, const: np.ndarray, grid: Grid,
    start: np.ndarray | None,
) -> np.ndarray:  # fmt: skip
    """The indices (p, m) as floats where every code may move."""
    high = None
    if len(u) == 1:
        ratio = u * inverse(step)
        first = None if start is None else start[0]
        low, high, _ = root(x, ratio, u * step, const[0], grid, first)
        shifted = low[:, None].astype(np.float32) * ratio
        shifted += x
        q = grid.round(shifted.copy())
    else:
        q, shifted = joint_root(x, step, u, const, grid)
    left, limit = missed(q, step, u, const, grid), enough(step, u)
    if high is not None:
        q = approach(q, x, step, u[0].astype(np.float64), high, left[0], grid)
    if x.shape[1] <= _COMBINED:
        q = combine(q, shifted, step, u, left, limit, grid)
    q = mend(q, x, step, u, left, limit, grid)
    return pair(q, x, step, u, left, limit, grid)


def missed(
    q: np.ndarray, step: np.ndarray, u: np.ndarray, const: np.ndarray, grid: Grid
) -> np.ndarray:
    """U (s·q) + const (k, p) in float64."""
    value, u64 = grid.value(q).astype(np.float64), u.astype(np.float64)
    moved = (u64 * step) @ value.T if len(step) == 1 else u64 @ (value * step).T
    found: np.ndarray = const + moved
    return found


def _heavy(u: np.ndarray) -> np.ndarray:
    """Rows of u that are frozen: far above the median, unless they are many or u is sparse."""
    size = np.abs(u).max(0)
    carried = size[size > 1e-12]
    if carried.size < 64:
        return np.zeros(size.shape, bool)
    heavy = size > _HEAVY * np.median(carried)
    return heavy if heavy.sum() <= size.size / 8 else np.zeros(size.shape, bool)
