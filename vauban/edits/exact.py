"""Direction-exact quantization: round a cut matrix onto its grid so that U Ŵ stays zero.

Plain requantization of a cut 4-bit matrix leaves 40 to 84 % of the direction. Minimising the
rounding error subject to u^T Ŵ_j = 0 leads to one scalar per column: round T + c_j u instead of T.
The two-sided form also asks Ŵ w = T w along the removed row w = v/|v|, by one scalar per row:
round T + c_j u_i + r_i w_j. Scales and offsets are given and kept. NumPy only; sees no model.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from vauban.edits.grids import FLOAT_MODES, Grid, grid_of, pack, scale_values
from vauban.edits.mending import approach, combine, mend
from vauban.edits.staircase import codes_wanted, inverse, joint_root, root
from vauban.edits.two_sided import Shifts, find_shifts, parallel, row_shifts
from vauban.errors import InputError

# Rows that carry far more of u than the rest are rounded first and never moved: their steps are
# coarser than the error to be mended.
_HEAVY = 8.0
# Alternations of the two-sided form with more than 8 codes, and with fewer, which settle late.
_ROUNDS = (4, 5)


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
    axis: str = "output",
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
    options: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": mode}
    t = np.array(target.astype(mx.float32))
    w = None if removed is None else np.atleast_2d(np.array(removed.astype(mx.float32)))
    if t.ndim == 2:
        found = round_matrix(
            t, directions, scales, biases, removed=w, rounds=rounds, axis=axis, **options
        )
        return mx.array(found)
    parts = [
        round_matrix(
            t[e], directions, scales[e], None if biases is None else biases[e],
            removed=w[e] if w is not None and w.ndim == 3 else w, rounds=rounds, axis=axis,
            **options,
        )
        for e in range(t.shape[0])
    ]  # fmt: skip
    return mx.array(np.stack(parts))


def round_matrix(
    target: np.ndarray,
    directions: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str = "affine",
    removed: np.ndarray | None = None,
    rounds: int | None = None,
    axis: str = "output",
    start: Shifts | None = None,
) -> np.ndarray:
    """As `quantize_direction_exact`, for one float32 matrix that is read and never copied.

    `start`: shifts to go on from, found on another grid.
    """
    grid, u, s, b = _problem(target, directions, scales, biases, group_size, bits, mode, axis)
    shifts = None
    if removed is not None and axis == "output":
        if rounds is None:
            rounds = _ROUNDS[len(grid.values) <= 8] - (start is not None)
        shifts = find_shifts(target, u, s, b, removed, grid, group_size, rounds, start)
    codes = _matrix(target, u, s, b, shifts, grid, group_size, axis)
    return pack(grid.codes[codes], bits)


def first_shifts(
    target: np.ndarray,
    directions: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    removed: np.ndarray | None = None,
    axis: str = "output",
) -> Shifts | None:
    """The shifts on a given affine grid: T with them is what a better grid has to round well.

    Of a matrix after one round of the two-sided form; of a table those of its rows.
    """
    grid, u, s, b = _problem(target, directions, scales, biases, group_size, bits, "affine", axis)
    if axis == "input":
        return row_shifts(target, u, s, b, grid, group_size)
    if removed is None:
        return None
    return find_shifts(target, u, s, b, removed, grid, group_size, 1)


def _problem(
    t: np.ndarray, directions: mx.array, scales: mx.array, biases: mx.array | None, group: int,
    bits: int, mode: str, axis: str,
) -> tuple[Grid, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Grid, directions (k, d), steps and offsets in float32, checked against the target."""
    grid = grid_of(mode, bits)
    if mode in FLOAT_MODES and group != FLOAT_MODES[mode][1]:
        raise InputError(f"{mode} has groups of {FLOAT_MODES[mode][1]}, not {group}")
    u = np.atleast_2d(np.array(directions.astype(mx.float32)))
    s = scale_values(scales, mode)
    b = np.zeros_like(s) if biases is None else np.array(biases.astype(mx.float32))
    _check(t, u, s, b, group, axis)
    return grid, u, s, b


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


def _check(
    t: np.ndarray, u: np.ndarray, s: np.ndarray, b: np.ndarray, group: int, axis: str
) -> None:
    if axis not in ("output", "input"):
        raise InputError(f"axis is {axis!r}; expected 'output' or 'input'")
    size = t.shape[-2] if axis == "output" else t.shape[-1]
    if t.ndim not in (2, 3) or u.shape[-1] != size:
        raise InputError(f"target {t.shape} and directions {u.shape} do not fit (axis {axis})")
    if s.shape != (*t.shape[:-1], t.shape[-1] // group) or b.shape != s.shape:
        raise InputError(f"scales {s.shape} do not fit target {t.shape} with groups of {group}")
    if not (np.isfinite(t).all() and np.isfinite(s).all() and np.isfinite(b).all()):
        raise InputError("target, scales or biases hold NaN or inf")


def _matrix(
    t: np.ndarray, u: np.ndarray, s: np.ndarray, b: np.ndarray, shifts: Shifts | None, grid: Grid,
    group: int, axis: str,
) -> np.ndarray:  # fmt: skip
    """Grid indices (out, in), uint8, of one matrix."""
    rows, columns = t.shape
    codes = np.empty((rows, columns), dtype=np.uint8)

    def one_rows(start: int) -> None:
        part = slice(start, start + 64)
        step, offset = np.repeat(s[part], group, axis=1), np.repeat(b[part], group, axis=1)
        const = (offset.astype(np.float64) @ u.T).T
        codes[part] = _round_block(codes_wanted(t[part], step, offset), step, u, const, grid)

    def one_group(g: int) -> None:
        part = slice(g * group, (g + 1) * group)
        step = s[:, g][None]
        x = codes_wanted(t[:, part].T, step, b[:, g][None])
        c = None
        if shifts is not None:
            c = shifts.right[: len(u), part]
            for r, w in zip(shifts.left[len(u) :], shifts.right[len(u) :, part], strict=True):
                x += w[:, None] * (r * inverse(step))
        const = np.broadcast_to((u.astype(np.float64) @ b[:, g])[:, None], (len(u), group))
        codes[:, part] = _round_block(x, step, u, const, grid, c).T

    if axis == "input":
        parallel(one_rows, range(0, rows, 64))
    else:
        parallel(one_group, range(columns // group))
    return codes


def _heavy(u: np.ndarray) -> np.ndarray:
    """Rows of u that are frozen: far above the median, unless they are many or u is sparse."""
    size = np.abs(u).max(0)
    carried = size[size > 1e-12]
    if carried.size < 64:
        return np.zeros(size.shape, bool)
    heavy = size > _HEAVY * np.median(carried)
    return heavy if heavy.sum() <= size.size / 8 else np.zeros(size.shape, bool)


def _round_block(
    x: np.ndarray, step: np.ndarray, u: np.ndarray, const: np.ndarray, grid: Grid,
    start: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Round p problems of m codes jointly: indices (p, m) uint8 with U (s·q + b) = 0 in each.

    x (p, m) wanted codes; step (1 or p, m); u (k, m); const (k, p) = U b; start (k, p) a shift to
    begin from.
    """
    heavy = _heavy(u)
    index = np.empty(x.shape, dtype=np.uint8)
    const = np.array(const, dtype=np.float64)
    if heavy.any():
        fixed = grid.round(x[:, heavy])
        index[:, heavy] = fixed
        value = grid.value(fixed).astype(np.float64) * step[:, heavy]
        const = const + u[:, heavy].astype(np.float64) @ value.T
        x, step, u = x[:, ~heavy], step[:, ~heavy], u[:, ~heavy]
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
    value, u64 = grid.value(q).astype(np.float64), u.astype(np.float64)
    left = const + ((u64 * step) @ value.T if len(step) == 1 else u64 @ (value * step).T)
    if high is not None:
        q = approach(q, x, step, u64[0], high, left[0], grid)
    q = combine(q, shifted, step, u, left, grid)
    index[:, ~heavy] = mend(q, x, step, u, left, grid)
    return index
