"""Rounding of a table that minds what its rows are used for: coordinate descent over the codes.

Every row e = ŵ - t costs e M eᵀ, M = XᵀX + D being how much each direction of a row matters, and
U ŵᵀ is to come out as wanted. One code after another takes the step that costs least while the
others stand (as Behdin et al. 2023, "QuantEase", arXiv 2309.01885, do for matrices), under a
penalty λ |U eᵀ|² that grows from next to nothing: the steps that move the direction are taken
where they cost least, not where a sweep happens to end. NumPy only; sees no model.
"""

from __future__ import annotations

import os

import numpy as np

from vauban.edits.jointly import missed
from vauban.edits.mending import enough, mend, pair
from vauban.edits.moments import Energy
from vauban.edits.problem import Problem
from vauban.edits.staircase import inverse
from vauban.edits.two_sided import parallel

# Every coordinate counts as if it carried at least this share of the mean sensitivity: what few
# texts did not show must not be forgotten, and the noise stays next to that of plain rounding.
DAMPING = 1.0
# Sweeps over all codes, and the first and last λ: in units of √d the first moves hardly a code, in
# units of d the last leaves some hundredths of what is asked, which single steps then make good.
_SWEEPS = 16
_FIRST, _LAST = 0.05, 0.5
# Codes of a row whose common change is taken to the others at once.
_WIDTH = 16
# Rows that are descended together: long enough for NumPy, short enough for a core's cache.
_ROWS = 1024
# The cheapest steps of a row whose pairs are tried, and rows of which all pairs are held at once.
_STEPS, _AT_ONCE = 128, 16


def descended_codes(asked: Problem, energy: Energy, damping: float = DAMPING) -> np.ndarray:
    """Grid indices (rows, d) uint8 of a table asked for by its rows (axis "input").

    `energy`: how much each direction of its rows matters (Fisher information of the stream there).
    """
    scale = 1.0 / max(energy.mean, 1e-30)
    factor = (energy.factor * np.sqrt(scale)).astype(np.float32)
    diagonal = (energy.rest * scale + damping).astype(np.float32)
    codes = np.empty(asked.shape, np.uint8)
    each = min(_ROWS, -(-len(codes) // (os.cpu_count() or 1)))

    def some(first: int) -> None:
        part = slice(first, min(first + each, len(codes)))
        x, step, const = asked.rows(part)
        index, slope = _descend(asked, x, step, factor, diagonal)
        left = missed(index, step, asked.basis, const, asked.grid)
        limit = enough(step, asked.basis)
        wanted = _settle(asked, index, step, slope, factor, diagonal, left, limit)
        index = mend(index, wanted, step, asked.basis, left, limit, asked.grid)
        codes[part] = pair(index, wanted, step, asked.basis, left, limit, asked.grid)

    parallel(some, range(0, len(codes), each))
    return codes


def _descend(
    asked: Problem, x: np.ndarray, step: np.ndarray, factor: np.ndarray, diagonal: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Codes (p, d) with little e M eᵀ + λ |U eᵀ|², and the slope M e (p, d) there.

    x (p, d) wanted codes, step (p, d), factor X (r, d), diagonal D (d,).
    """
    grid, u = asked.grid, asked.basis
    d = x.shape[1]
    # Codes lie one after another in memory: every step below takes one code of all rows.
    index = np.ascontiguousarray(grid.round(x.copy()).T)
    steps = np.ascontiguousarray(step.T)
    inverses = inverse(steps)
    error = (grid.value(index) - x.T) * steps
    seen, along = factor @ error, u @ error
    for penalty in np.geomspace(_FIRST * np.sqrt(d), _LAST * d, _SWEEPS).astype(np.float32):
        for start in range(0, d, _WIDTH):
            part = slice(start, min(start + _WIDTH, d))
            own, pull = factor[:, part], u[:, part]
            form = own.T @ own + np.diag(diagonal[part]) + penalty * (pull.T @ pull)
            slope = own.T @ seen + diagonal[part, None] * error[part]
            slope += penalty * (pull.T @ along)
            before = error[part].copy()
            for i, j in enumerate(range(part.start, part.stop)):
                value = grid.value(index[j]).copy()
                index[j] = grid.round(value - slope[i] * (inverses[j] / form[i, i]))
                change = (grid.value(index[j]) - value) * steps[j]
                error[j] += change
                slope[i + 1 :] += form[i + 1 :, i, None] * change
            moved = error[part] - before
            seen += own @ moved
            along += pull @ moved
    slope = factor.T @ seen + diagonal[:, None] * error
    return np.ascontiguousarray(index.T), np.ascontiguousarray(slope.T)


def _settle(
    asked: Problem, index: np.ndarray, step: np.ndarray, slope: np.ndarray, factor: np.ndarray,
    diagonal: np.ndarray, left: np.ndarray, limit: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """One or two steps per row, the cheapest that bring |left| within `limit`; in place.

    What they cost is exact, both together included. Rows without such a pair stay as they are.
    Returns what each code would be as a real number beside the others, (p, d).
    """
    grid, u, d = asked.grid, asked.basis, index.shape[1]
    curvature = (factor**2).sum(0) + diagonal
    wanted: np.ndarray = grid.value(index) - slope * inverse(step) / curvature
    limit = np.broadcast_to(limit, (len(index), 1))
    open_rows = np.flatnonzero(np.sqrt((left**2).sum(0)) > limit[:, 0])
    count = min(_STEPS, 2 * d)
    single = np.arange(count)
    for first in range(0, len(open_rows), _AT_ONCE):
        rows = open_rows[first : first + _AT_ONCE]
        there = np.stack([np.clip(index[rows] + way, 0, grid.top) for way in (1, -1)], 1)
        change = (grid.value(there) - grid.value(index[rows])[:, None]) * step[rows][:, None]
        cost = change * (2 * slope[rows][:, None] + change * curvature)
        cost[change == 0] = np.inf
        there, change, cost = (a.reshape(len(rows), -1) for a in (there, change, cost))
        best = np.argpartition(cost, count - 1, axis=1)[:, :count]
        there, change, cost = (np.take_along_axis(a, best, 1) for a in (there, change, cost))
        code = best % d
        # (a + b) M (a + b)ᵀ has what M puts between two steps of different codes besides.
        between = 2 * _products(factor, code) * change[:, :, None] * change[:, None, :]
        total = cost[:, :, None] + cost[:, None, :] + between
        total[code[:, :, None] == code[:, None, :]] = np.inf
        total[:, single, single] = cost
        after = np.zeros_like(total)
        for i in range(len(u)):
            moved = change * u[i, code]
            here = left[i, rows].astype(np.float32)[:, None, None]
            both = here + moved[:, :, None] + moved[:, None, :]
            both[:, single, single] = here[:, :, 0] + moved
            after += both**2
        total[~(after <= (limit[rows] ** 2)[:, :, None])] = np.inf
        flat = total.reshape(len(rows), -1)
        chosen = flat.argmin(1)
        found = np.flatnonzero(np.isfinite(flat[np.arange(len(rows)), chosen]))
        one, two = np.divmod(chosen, count)
        # A single step stands on the diagonal, and is made once.
        for taken, r in ((one, found), (two, found[one[found] != two[found]])):
            i = code[r, taken[r]]
            left[:, rows[r]] += u[:, i].astype(np.float64) * change[r, taken[r]]
            index[rows[r], i] = there[r, taken[r]]
    return wanted


def _products(factor: np.ndarray, code: np.ndarray) -> np.ndarray:
    """(XᵀX)_ij for the codes (p, n) of each row: (p, n, n)."""
    own = np.moveaxis(factor[:, code], 0, 1)
    found: np.ndarray = np.swapaxes(own, 1, 2) @ own
    return found
