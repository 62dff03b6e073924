"""Round a table's rows for what they are used for: coordinate descent over the codes.

A row's error e costs e M eᵀ, M = XᵀX + D being how much each direction of a row matters, and U ŵᵀ
is to come out as wanted. One code after another takes the step that costs least while the others
stand (as Behdin et al. 2023, "QuantEase", arXiv 2309.01885, do for matrices), under a penalty
λ |U eᵀ|² that grows from next to nothing: the steps that move the direction are taken where they
cost least, not where a sweep happens to end.
"""

from __future__ import annotations

import os

import numpy as np

from vauban.rounding.exact import close_gap, missed, round_exact
from vauban.rounding.grid import inverse, parallel
from vauban.rounding.problem import Problem
from vauban.rounding.second_moment import Energy

# Share of the mean sensitivity that every coordinate has at least: what few texts did not show must
# not be forgotten, and the noise stays next to that of plain rounding.
DAMPING = 1.0
# Sweeps over all codes, and the first and last λ: in units of √d the first moves hardly a code, in
# units of d the last leaves some hundredths of what is asked, which single codes then close.
_SWEEPS = 8
_FIRST, _LAST = 0.05, 0.5
# Codes of a row whose common change is taken to the others at once.
_WIDTH = 16
# Rows that are rounded together: long enough for NumPy, short enough for a core's cache.
_ROWS = 512


def round_table(asked: Problem, energy: Energy | None = None) -> np.ndarray:
    """Grid indices (rows, d) uint8 of a table asked for by its rows (axis "input").

    `energy`: how much each direction of its rows matters (Fisher information of the stream there).
    Without it every row is just nearest and exact.
    """
    codes = np.empty(asked.shape, np.uint8)

    def some(part: slice) -> None:
        x, step, u, const = asked.rows(part)
        if energy is None:
            codes[part] = round_exact(x, step, u, const, asked.grid)
            return
        index, wanted = _descend(asked, x, step, energy)
        left = missed(index, step, u, const, asked.grid)
        codes[part] = close_gap(index, wanted, step, u, left, asked.grid)

    parallel(some, len(codes), min(_ROWS, -(-len(codes) // (os.cpu_count() or 1))))
    return codes


def _descend(
    asked: Problem, x: np.ndarray, step: np.ndarray, energy: Energy
) -> tuple[np.ndarray, np.ndarray]:
    """Codes (p, d) with little e M eᵀ + λ |U eᵀ|², and what each would be as a real number beside
    the others.

    x (p, d) wanted codes, step (p, d).
    """
    grid, u, d = asked.grid, asked.basis, x.shape[1]
    factor, diagonal = (a.astype(np.float32) for a in energy.scaled(DAMPING))
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
    wanted = grid.value(index) - slope * inverses / ((factor**2).sum(0) + diagonal)[:, None]
    return np.ascontiguousarray(index.T), np.ascontiguousarray(wanted.T)
