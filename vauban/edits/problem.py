"""One matrix to be rounded on a given grid so that U Ŵ comes out as wanted: a value, checked once.

NumPy only; rounds nothing, sees no module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import numpy as np

from vauban.edits.grids import FLOAT_MODES, Grid, grid_of, scale_values
from vauban.edits.staircase import codes_wanted
from vauban.errors import InputError

Axis = Literal["output", "input"]


@dataclass(frozen=True, eq=False)
class Problem:
    """Find Ŵ = s·q + b near `target` T (out, in) with U Ŵ = `aim`.

    basis  U (k, out), or (k, in) for axis "input", where every ROW is asked: Ŵ Uᵀ = aim
    steps, offsets   s, b (out, in/group) in float32
    aim    (k, in), or (k, out) for axis "input", in float64; zero for a whole cut
    """

    target: np.ndarray
    basis: np.ndarray
    steps: np.ndarray
    offsets: np.ndarray
    aim: np.ndarray
    grid: Grid
    group: int
    axis: Axis
    mode: str = "affine"

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.target.shape
        return rows, columns

    def columns(
        self, part: slice, moved: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Columns of one group as problems: wanted codes (p, out), steps (1, out), const (k, p).

        U (s·q) + const = 0 is what is asked; `moved` (out, p) stands in for the target there.
        """
        g = part.start // self.group
        step, offset = self.steps[:, g, None], self.offsets[:, g, None]
        t = self.target[:, part] if moved is None else moved
        # Computed in the target's own order and turned afterwards: three times faster.
        wanted = np.ascontiguousarray(codes_wanted(t, step, offset).T)
        constant = self.basis.astype(np.float64) @ offset
        return wanted, np.ascontiguousarray(step.T), constant - self.aim[:, part]

    def rows(self, part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows as problems: wanted codes (p, in), steps (p, in), const (k, p)."""
        step = np.repeat(self.steps[part], self.group, axis=1)
        offset = np.repeat(self.offsets[part], self.group, axis=1)
        constant = (offset.astype(np.float64) @ self.basis.T).T - self.aim[:, part]
        return codes_wanted(self.target[part], step, offset), step, constant


def problem(
    target: np.ndarray,
    directions: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str = "affine",
    axis: Axis = "output",
    aim: np.ndarray | None = None,
) -> Problem:
    """Everything in float32, checked. Raises InputError for shapes that do not fit, NaN and inf."""
    if axis not in ("output", "input"):
        raise InputError(f"axis is {axis!r}; expected 'output' or 'input'")
    grid = grid_of(mode, bits)
    if mode in FLOAT_MODES and group_size != FLOAT_MODES[mode][1]:
        raise InputError(f"{mode} has groups of {FLOAT_MODES[mode][1]}, not {group_size}")
    if (biases is None) != (mode in FLOAT_MODES):
        raise InputError(f"mode {mode} {'needs' if biases is None else 'has no'} biases")
    u = np.atleast_2d(np.array(directions.astype(mx.float32)))
    s = scale_values(scales, mode)
    b = np.zeros_like(s) if biases is None else np.array(biases.astype(mx.float32))
    along, across = (-2, -1) if axis == "output" else (-1, -2)
    if target.ndim != 2 or u.shape[-1] != target.shape[along]:
        raise InputError(f"target {target.shape} and directions {u.shape} do not fit (axis {axis})")
    if s.shape != (len(target), target.shape[1] // group_size) or b.shape != s.shape:
        raise InputError(
            f"scales {s.shape} do not fit target {target.shape} with groups of {group_size}"
        )
    # NaN wins both, and no copy is made.
    if not all(np.isfinite([a.min(), a.max()]).all() for a in (target, s, b) if a.size):
        raise InputError("target, scales or biases hold NaN or inf")
    wanted = np.zeros((len(u), target.shape[across]))
    if aim is not None:
        if aim.shape != wanted.shape:
            raise InputError(f"aim has shape {aim.shape}; expected {wanted.shape} (axis {axis})")
        wanted = aim.astype(np.float64)
    return Problem(target, u, s, b, wanted, grid, group_size, axis, mode)
