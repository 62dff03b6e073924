"""Roots of staircases: the shift c for which the rounded codes of x + Uᵀc/s have U (s·q + b) = 0.

Each component is non-decreasing in its own shift, in steps of single codes. NumPy only; sees no
matrix, only p problems of m codes each.
"""

from __future__ import annotations

import numpy as np

from vauban.edits.grids import Grid

# The first bracket in expected distances; longer ones hold more codes that move.
_REACH = 1.5
_DOUBLINGS = 8
# Refinements of a bracket: single codes are moved after it, or the next round moves the root.
_STEPS = 5
_NEWTON = 8


def inverse(step: np.ndarray) -> np.ndarray:
    """1/s, and 0 where s = 0: such a code changes nothing."""
    return np.divide(1.0, step, out=np.zeros_like(step), where=step != 0)


def codes_wanted(t: np.ndarray, step: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """(T - b)/s, contiguous; 0 where s = 0."""
    wanted = np.subtract(t, offset, dtype=np.float32, order="C")
    return np.multiply(wanted, inverse(step), out=wanted)


def root(
    x: np.ndarray, ratio: np.ndarray, weight: np.ndarray, const: np.ndarray, grid: Grid,
    start: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """c (p,) with f(c) = Σ_i weight_i · grid(x_i + c ratio_i) + const = 0, f non-decreasing.

    A bracket from the expected slope Σ weight·ratio, then regula falsi. Returns both ends, the
    undershooting one first, and the crossing of the chord between them. ratio and weight are
    (1 or p, m).
    """
    slope = (weight * ratio).sum(1)
    slope = np.where(slope > 0, slope, 1.0)
    here = np.zeros(x.shape[0]) if start is None else start.astype(np.float64)
    at_start = _shifted_values(x, ratio, here, grid)
    at = _along(at_start, weight) + const
    value = at.copy()
    # Walk against the sign of f, doubling, until it changes: [low, high] then holds the root.
    reach = -_REACH * value / slope
    other = here + reach
    at_other = _shifted_values(x, ratio, other, grid)
    other_value = _along(at_other, weight) + const
    for _ in range(_DOUBLINGS):
        same = np.flatnonzero((value <= 0) == (other_value <= 0))
        if not same.size:
            break
        here[same], value[same] = other[same], other_value[same]
        reach[same] *= 2
        other[same] += reach[same]
        own = _of(ratio, same), _of(weight, same)
        further = _shifted_values(x[same], own[0], other[same], grid)
        other_value[same] = _along(further, own[1]) + const[same]
        at_other[same] = further
    swap = value > 0
    low, f_low = np.where(swap, other, here), np.where(swap, other_value, value)
    high, f_high = np.where(swap, here, other), np.where(swap, value, other_value)
    # A code that is the same at the start and the far end is so between them, and most are.
    moving = np.flatnonzero((at_start != at_other).any(0))
    x, ratio, weight = (np.take(a, moving, axis=1) for a in (x, ratio, weight))
    const = at - _along(np.take(at_start, moving, axis=1), weight)

    def share() -> np.ndarray:
        return np.divide(-f_low, f_high - f_low, out=np.full(len(x), 0.5), where=f_high > f_low)

    for _ in range(_STEPS):
        # Regula falsi, kept off the ends so that the bracket shrinks from both sides.
        middle = low + np.clip(share(), 0.15, 0.85) * (high - low)
        value = _along(_shifted_values(x, ratio, middle, grid), weight) + const
        under = value <= 0
        low, f_low = np.where(under, middle, low), np.where(under, value, f_low)
        high, f_high = np.where(under, high, middle), np.where(under, f_high, value)
    # Without a change of sign the chord crosses zero far away, or nowhere: the nearer end then.
    return low, high, low + np.clip(share(), 0.0, 1.0) * (high - low)


def _shifted_values(x: np.ndarray, ratio: np.ndarray, c: np.ndarray, grid: Grid) -> np.ndarray:
    """grid(x + c ratio), (p, m)."""
    moved = c[:, None].astype(np.float32) * ratio
    moved += x
    return grid.value(grid.round(moved, out=moved))


def _along(value: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Σ_i weight_i value_i of each problem (p,); one BLAS call where all have the same weights."""
    if len(weight) == 1:
        return value @ weight[0]
    found: np.ndarray = np.einsum("pm,pm->p", value, weight)
    return found


def _of(shared: np.ndarray, problems: np.ndarray) -> np.ndarray:
    """The rows of some problems; the one row that all share."""
    return shared if len(shared) == 1 else shared[problems]


def joint_root(
    x: np.ndarray, step: np.ndarray, u: np.ndarray, const: np.ndarray, grid: Grid
) -> tuple[np.ndarray, np.ndarray]:
    """Indices with F(c) = U (s · grid(x + Uᵀc/s)) + const near zero in all k components.

    And the shifted codes x + Uᵀc/s they were rounded from.
    One root per direction with the others held, twice round; then damped Newton steps, of which
    the best is kept (F is a staircase, and a step may miss).
    """
    inv = inverse(step)
    c = np.zeros((x.shape[0], len(u)))
    for _ in range(2):
        for i in range(len(u)):
            held = c.astype(np.float32)
            held[:, i] = 0.0
            wanted = x + (held @ u) * inv
            c[:, i] = root(wanted, u[i] * inv, u[i] * step, const[i], grid, c[:, i])[2]
    best, reached, best_norm = grid.round(x.copy()), x.copy(), np.full(x.shape[0], np.inf)
    for _ in range(_NEWTON):
        wanted = x + (c.astype(np.float32) @ u) * inv
        q = grid.round(wanted.copy())
        left = (grid.value(q) * step).astype(np.float64) @ u.T.astype(np.float64) + const.T
        norm = np.linalg.norm(left, axis=1)
        better = norm < best_norm
        best[better], reached[better] = q[better], wanted[better]
        best_norm = np.minimum(norm, best_norm)
        inside = ((wanted > grid.values[0]) & (wanted < grid.values[-1])).astype(np.float32)
        slope = np.einsum("pm,im,jm->pij", inside, u, u, optimize=True) + 1e-3 * np.eye(len(u))
        c -= 0.7 * np.linalg.solve(slope, left[..., None])[..., 0]
    return best, reached
