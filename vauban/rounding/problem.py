"""One matrix that is to be rounded on a given grid so that U Ŵ comes out as wanted, as a value.

Checks what it is given, and hands out columns or rows as problems of their own; rounds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from vauban.errors import InputError
from vauban.rounding.grid import FLOAT_MODES, Grid, grid_of, inverse, scale_values

Axis = Literal["output", "input"]


@dataclass(frozen=True, eq=False)
class Problem:
    """Find codes q for which Ŵ = s·q + b is near the target T and U Ŵ is the aim.

    target  T (out, in) in float32
    basis   U (k, out) row-orthonormal; (k, in) for axis "input", where Ŵ Uᵀ is asked, row by row
    steps, offsets   s, b (out, in/group) in float32; b is 0 for the float modes
    aim     (k, in), or (k, out) for axis "input", in float64; zero for a whole cut
    """

    target: np.ndarray
    basis: np.ndarray
    steps: np.ndarray
    offsets: np.ndarray
    aim: np.ndarray
    grid: Grid
    group: int
    axis: Axis

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.target.shape
        return rows, columns

    def columns(
        self, part: slice, target: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Columns of one group as problems: wanted codes (p, out), steps (1, out), U, const (k, p).

        `target` (out, p) stands for T there. U (s·q) + const = 0 is what is asked.
        """
        step, offset = (a[:, part.start // self.group, None] for a in (self.steps, self.offsets))
        # Computed in the target's own order and turned afterwards: three times faster.
        wanted = np.ascontiguousarray(((target - offset) * inverse(step)).T)
        const = self.basis.astype(np.float64) @ offset - self.aim[:, part]
        return wanted, np.ascontiguousarray(step.T), self.basis, const

    def rows(self, part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Rows as problems: wanted codes (p, in), steps (p, in), U, const (k, p)."""
        step, offset = (np.repeat(a[part], self.group, axis=1) for a in (self.steps, self.offsets))
        const = self.basis.astype(np.float64) @ offset.T - self.aim[:, part]
        return (self.target[part] - offset) * inverse(step), step, self.basis, const

    def values(self, codes: np.ndarray, part: slice) -> np.ndarray:
        """Ŵ of the codes (out, p) of columns of one group."""
        step, offset = (a[:, part.start // self.group, None] for a in (self.steps, self.offsets))
        values: np.ndarray = self.grid.value(codes.astype(np.float32)) * step + offset
        return values


def problem(
    target: np.ndarray,
    basis: np.ndarray,
    scales: np.ndarray,
    offsets: np.ndarray | None,
    *,
    group_size: int,
    bits: int,
    mode: str = "affine",
    axis: Axis = "output",
    aim: np.ndarray | None = None,
    name: str = "the target",
) -> Problem:
    """A `Problem` in float32, checked.

    scales (out, in/group) as stored, offsets alike, None for the float modes. Raises InputError for
    shapes that do not fit, and for NaN and inf (`name` is what the message calls the matrix).
    """
    if axis not in ("output", "input"):
        raise InputError(f"axis is {axis!r}; expected 'output' or 'input'")
    grid = grid_of(mode, bits)
    if mode in FLOAT_MODES and group_size != FLOAT_MODES[mode][1]:
        raise InputError(f"{mode} has groups of {FLOAT_MODES[mode][1]}, not {group_size}")
    if (offsets is None) != (mode in FLOAT_MODES):
        raise InputError(f"mode {mode} {'needs' if offsets is None else 'has no'} biases")
    t, u = (np.asarray(a, np.float32) for a in (target, np.atleast_2d(basis)))
    s = scale_values(scales, mode)
    b = np.zeros_like(s) if offsets is None else offsets.astype(np.float32)
    along, across = (0, 1) if axis == "output" else (1, 0)
    if t.ndim != 2 or u.shape[-1] != t.shape[along]:
        raise InputError(f"target {t.shape} and directions {u.shape} do not fit (axis {axis})")
    if s.shape != (len(t), t.shape[1] // group_size) or b.shape != s.shape:
        raise InputError(
            f"scales {s.shape} do not fit target {t.shape} with groups of {group_size}"
        )
    # A minimum is NaN as soon as one value is, and needs no second array.
    if not all(np.isfinite([a.min(), a.max()]).all() for a in (t, u, s, b) if a.size):
        raise InputError(f"{name}, its directions, scales or biases hold NaN or inf")
    wanted = np.zeros((len(u), t.shape[across])) if aim is None else aim.astype(np.float64)
    if wanted.shape != (len(u), t.shape[across]) or not np.isfinite(wanted).all():
        raise InputError(
            f"aim has shape {wanted.shape}; expected finite values of shape "
            f"{(len(u), t.shape[across])} (axis {axis})"
        )
    return Problem(t, u, s, b, wanted, grid, group_size, axis)
