"""Direction-exact quantization: round a cut matrix onto its grid so that U Ŵ is what it should be.

Plain requantization of a cut 4-bit matrix leaves 40 to 84 % of the direction. Minimising the
rounding error subject to u^T Ŵ_j = a_j (0 for a whole cut) leads to one scalar per column: round
T + c_j u instead of T. The two-sided form also asks Ŵ w = T w along the removed row w = v/|v|, by
one scalar per row: round T + c_j u_i + r_i w_j. Scales and offsets are given and kept. NumPy only;
sees no model.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from vauban._backend import one_blas_thread
from vauban.edits.grids import grid_of, pack, scale_values
from vauban.edits.jointly import round_jointly
from vauban.edits.problem import Axis, Problem, problem
from vauban.edits.staircase import codes_wanted, inverse
from vauban.edits.two_sided import Shifts, find_shifts, parallel, row_shifts
from vauban.errors import InputError

# Alternations of the two-sided form with more than 8 codes, and with fewer, which settle late.
_ROUNDS = (5, 6)
_TABLE_ROWS = 64


@one_blas_thread()
def quantize_direction_exact(
    target: mx.array,
    directions: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str = "affine",
    removed: mx.array | None = None,
    rounds: int | None = None,
    axis: Axis = "output",
) -> mx.array:
    """Packed weight (uint32) of `target` on the given grid with (almost) nothing of U in it.

    target (out, in) or (E, out, in) float: the cut matrix. directions (k, out) row-orthonormal.
    scales, biases (..., out, in/group_size) as stored; biases None for mxfp4, mxfp8 and nvfp4.
    removed (k, in) = U W, the rows the cut took out: with it the rounding is two-sided
    (`rounds` alternations), so that inputs along it see no substitute; without it one-sided
    ("fast"). axis "input" takes directions (k, in) and empties every ROW, for embeddings.

    Raises InputError for shapes that do not fit.

    >>> import mlx.core as mx
    >>> w = mx.random.normal((256, 128), key=mx.random.key(0))
    >>> u = mx.full((1, 256), 1 / 16)
    >>> q, s, b = mx.quantize(w, group_size=64, bits=4)
    >>> w = mx.dequantize(q, s, b, group_size=64, bits=4)
    >>> packed = quantize_direction_exact(w - u.T @ (u @ w), u, s, b, group_size=64, bits=4)
    >>> left = u @ mx.dequantize(packed, s, b, group_size=64, bits=4)
    >>> (mx.linalg.norm(left) / mx.linalg.norm(u @ w)).item() < 1e-3
    True
    """
    options: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": mode, "axis": axis}
    t = np.array(target.astype(mx.float32))
    w = None if removed is None else np.atleast_2d(np.array(removed.astype(mx.float32)))

    def one(matrix: np.ndarray, s: mx.array, b: mx.array | None, w: np.ndarray | None) -> Any:
        asked = problem(matrix, directions, s, b, **options)
        return pack_codes(asked, exact_codes(asked, w, rounds))

    if t.ndim != 3:
        return mx.array(one(t, scales, biases, w))
    if scales.ndim != 3 or len(scales) != len(t):
        raise InputError(f"scales {scales.shape} do not fit target {t.shape}")
    parts = [
        one(
            t[e], scales[e], None if biases is None else biases[e],
            w[e] if w is not None and w.ndim == 3 else w,
        )
        for e in range(t.shape[0])
    ]  # fmt: skip
    return mx.array(np.stack(parts))


def exact_codes(
    asked: Problem,
    removed: np.ndarray | None = None,
    rounds: int | None = None,
    start: Shifts | None = None,
) -> np.ndarray:
    """Grid indices (out, in) uint8, two-sided where the `removed` rows (j, in) are given.

    `start`: shifts to go on from, found on another grid. The target is read and never copied.
    """
    if asked.axis == "input":
        return _by_rows(asked)
    shifts = None
    if removed is not None:
        if rounds is None:
            rounds = _ROUNDS[len(asked.grid.values) <= 8] - (start is not None)
        shifts = find_shifts(asked, removed, rounds, start)
    return _by_groups(asked, shifts)


def first_shifts(asked: Problem, removed: np.ndarray | None = None) -> Shifts | None:
    """The shifts on a given affine grid: T with them is what a better grid has to round well.

    Of a matrix after one round of the two-sided form; of a table those of its rows.
    """
    if asked.axis == "input":
        return row_shifts(asked)
    return None if removed is None else find_shifts(asked, removed, 1)


def pack_codes(asked: Problem, codes: np.ndarray) -> np.ndarray:
    """The stored words (out, in · bits / 32) of grid indices."""
    # An affine grid's codes are its indices: a matrix of them is not looked up for nothing.
    stored = codes if asked.grid.uniform else asked.grid.codes[codes]
    return pack(stored, asked.grid.bits)


def round_plainly(
    target: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str = "affine",
) -> mx.array:
    """Packed weight of `target` on the given grid, every code the nearest one."""
    grid = grid_of(mode, bits)
    step = np.repeat(scale_values(scales, mode), group_size, axis=-1)
    offset = np.zeros_like(step)
    if biases is not None:
        offset = np.repeat(np.array(biases.astype(mx.float32)), group_size, axis=-1)
    wanted = codes_wanted(np.array(target.astype(mx.float32)), step, offset)
    return mx.array(pack(grid.codes[grid.round(wanted).astype(np.uint8)], bits))


def _by_rows(asked: Problem) -> np.ndarray:
    """The codes of a table, some rows at a time."""
    codes = np.empty(asked.shape, dtype=np.uint8)

    def some(start: int) -> None:
        part = slice(start, start + _TABLE_ROWS)
        x, step, const = asked.rows(part)
        codes[part] = round_jointly(x, step, asked.basis, const, asked.grid)

    parallel(some, range(0, len(codes), _TABLE_ROWS))
    return codes


def _by_groups(asked: Problem, shifts: Shifts | None) -> np.ndarray:
    """The codes of a matrix, one group of columns at a time."""
    codes = np.empty(asked.shape, dtype=np.uint8)
    k = len(asked.basis)

    def one_group(g: int) -> None:
        part = slice(g * asked.group, (g + 1) * asked.group)
        x, step, const = asked.columns(part)
        c = None
        if shifts is not None:
            c = shifts.right[:k, part]
            for r, w in zip(shifts.left[k:], shifts.right[k:, part], strict=True):
                x += w[:, None] * (r * inverse(step))
        codes[:, part] = round_jointly(x, step, asked.basis, const, asked.grid, c).T

    parallel(one_group, range(codes.shape[1] // asked.group))
    return codes
