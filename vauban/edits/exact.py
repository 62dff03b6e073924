"""Direction-exact quantization: round a cut matrix onto its grid so that U Ŵ stays zero.

Plain requantization of a cut 4-bit matrix leaves 40 to 84 % of the direction. Minimising the
rounding error subject to u^T Ŵ_j = 0 leads to one scalar per column: round T + c_j u instead of T.
The two-sided form also asks Ŵ w = T w along the removed row w = v/|v|, by one scalar per row:
round T + c_j u_i + r_i w_j. Scales and offsets are given and kept. NumPy only; sees no model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from vauban.edits.grids import FLOAT_MODES, Grid, grid_of, pack, scale_values
from vauban.errors import InputError

# Rows that carry far more of u than the rest are rounded first and never moved: their steps are
# coarser than the error to be mended.
_HEAVY = 8.0
# Leak that the two-sided form leaves in place, in units of what was removed.
_SPARED = 0.1
_DOUBLINGS = 8
_NEWTON = 8
# Rows that are solved together: their arrays should stay in a core's cache.
_ROWS = 16
# Steps next in size that are looked at for one that is legal.
_WINDOW = 8


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
) -> np.ndarray:
    """As `quantize_direction_exact`, for one float32 matrix that is read and never copied."""
    grid = grid_of(mode, bits)
    if mode in FLOAT_MODES and group_size != FLOAT_MODES[mode][1]:
        raise InputError(f"{mode} has groups of {FLOAT_MODES[mode][1]}, not {group_size}")
    u = np.atleast_2d(np.array(directions.astype(mx.float32)))
    s = scale_values(scales, mode)
    b = np.zeros_like(s) if biases is None else np.array(biases.astype(mx.float32))
    _check(target, u, s, b, group_size, axis)
    if rounds is None:
        # Coarse codes answer a shift in larger jumps and need more rounds to settle.
        rounds = 4 if len(grid.values) > 8 else 6
    codes = _matrix(target, u, s, b, removed, grid, group_size, rounds, axis)
    return pack(grid.codes[codes], bits)


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
    wanted = _codes_wanted(np.array(target.astype(mx.float32)), step, offset)
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


def _parallel(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    """NumPy releases the interpreter lock in its loops, so threads use all cores."""
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        list(pool.map(work, items))


def _matrix(
    t: np.ndarray, u: np.ndarray, s: np.ndarray, b: np.ndarray, w: np.ndarray | None, grid: Grid,
    group: int, rounds: int, axis: str,
) -> np.ndarray:  # fmt: skip
    """Grid indices (out, in), uint8, of one matrix."""
    rows, columns = t.shape
    codes = np.empty((rows, columns), dtype=np.uint8)
    if axis == "input":

        def one_rows(start: int) -> None:
            part = slice(start, start + 64)
            step = np.repeat(s[part], group, axis=1)
            offset = np.repeat(b[part], group, axis=1)
            x = _codes_wanted(t[part], step, offset)
            const = (offset.astype(np.float64) @ u.T).T
            codes[part] = _round_block(x, step, u, const, grid)[0]

        _parallel(one_rows, range(0, rows, 64))
        return codes
    shift = _row_shifts(t, u, s, b, w, grid, group, rounds) if w is not None else None

    def one_group(g: int) -> None:
        part = slice(g * group, (g + 1) * group)
        step = s[:, g][None]
        x = _codes_wanted(t[:, part].T, step, b[:, g][None])
        if shift is not None:
            r, along = shift
            for i in range(len(r)):
                x += along[i][part, None] * r[i][None] * _inverse(step)
        const = np.broadcast_to((u.astype(np.float64) @ b[:, g])[:, None], (len(u), group))
        codes[:, part] = _round_block(x, step, u, const, grid)[0].T

    _parallel(one_group, range(columns // group))
    return codes


def _inverse(step: np.ndarray) -> np.ndarray:
    return np.divide(1.0, step, out=np.zeros_like(step), where=step != 0)


def _codes_wanted(t: np.ndarray, step: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """(T - b)/s, contiguous; 0 where s = 0."""
    return np.ascontiguousarray((t - offset) * _inverse(step), dtype=np.float32)


def _heavy(u: np.ndarray) -> np.ndarray:
    """Rows of u that are frozen: far above the median, unless they are many or u is sparse."""
    size = np.abs(u).max(0)
    carried = size[size > 1e-12]
    if carried.size < 64:
        return np.zeros(size.shape, bool)
    heavy = size > _HEAVY * np.median(carried)
    return heavy if heavy.sum() <= size.size / 8 else np.zeros(size.shape, bool)


def _round_block(
    x: np.ndarray, step: np.ndarray, u: np.ndarray, const: np.ndarray, grid: Grid
) -> tuple[np.ndarray, np.ndarray]:
    """Round p problems of m codes jointly: indices (p, m) uint8 with U (s·q + b) = 0 in each.

    x (p, m) wanted codes; step (1 or p, m); u (k, m); const (k, p) = U b. Returns the indices and
    what is left (k, p).
    """
    heavy = _heavy(u)
    index = np.empty(x.shape, dtype=np.float32)
    const = np.array(const, dtype=np.float64)
    if heavy.any():
        fixed = grid.round(x[:, heavy])
        index[:, heavy] = fixed
        value = grid.value(fixed).astype(np.float64) * step[:, heavy]
        const = const + u[:, heavy].astype(np.float64) @ value.T
    free = ~heavy if heavy.any() else slice(None)
    xf, sf, uf = x[:, free], np.ascontiguousarray(step[:, free]), np.ascontiguousarray(u[:, free])
    if len(u) == 1:
        ratio = uf[0] * _inverse(sf)
        low, high = _root(xf, ratio, uf[0] * sf, const[0], grid)
        q = low[:, None].astype(np.float32) * ratio
        q = grid.round(np.add(q, xf, out=q), out=q)
    else:
        q = _joint_root(xf, sf, uf, const, grid)
    value, uf64 = grid.value(q).astype(np.float64), uf.astype(np.float64)
    left = const + ((uf64 * sf) @ value.T if len(sf) == 1 else uf64 @ (value * sf).T)
    if len(u) == 1:
        q = _approach(q, xf, sf, uf64[0], high, left[0], grid)
    if grid.uniform and len(u) == len(sf) == 1:
        q = _mend_one(q, uf64[0] * sf[0], left[0], grid, picks=24)
    q = _mend(q, sf, uf, left, grid, picks=24 * len(u))
    index[:, free] = q
    return index.astype(np.uint8), left


def _root(
    x: np.ndarray, ratio: np.ndarray, weight: np.ndarray, const: np.ndarray, grid: Grid,
    start: np.ndarray | None = None, steps: int = 7,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """c (p,) with f(c) = Σ_i weight_i · grid(x_i + c ratio_i) + const = 0, f non-decreasing.

    A bracket from the expected slope Σ weight·ratio, then regula falsi; both ends are returned,
    the undershooting one first. f is a staircase whose steps are those of single codes.
    """
    p = x.shape[0]
    buffer = np.empty(x.shape, dtype=np.float32)
    shared = ratio.shape[0] == 1 if ratio.ndim == 2 else True
    ratio2, weight2 = np.atleast_2d(ratio), np.atleast_2d(weight)
    slope = (weight2 * ratio2).sum(1)
    slope = np.where(slope > 0, slope, 1.0)

    def f(c: np.ndarray) -> np.ndarray:
        np.multiply(c[:, None].astype(np.float32), ratio2, out=buffer)
        np.add(buffer, x, out=buffer)
        value = grid.value(grid.round(buffer, out=buffer))
        if shared:
            return value @ weight2[0] + const
        return np.einsum("pm,pm->p", value, weight2) + const

    here = np.zeros(p) if start is None else start.astype(np.float64)
    value = f(here)
    # Walk against the sign of f, doubling, until it changes: [low, high] then holds the root.
    reach = -1.5 * value / slope
    other, other_value = here + reach, f(here + reach)
    for _ in range(_DOUBLINGS):
        same = (value <= 0) == (other_value <= 0)
        if not same.any():
            break
        here, value = np.where(same, other, here), np.where(same, other_value, value)
        reach = np.where(same, 2 * reach, reach)
        other = np.where(same, here + reach, other)
        other_value = np.where(same, f(other), other_value)
    swap = value > 0
    low, f_low = np.where(swap, other, here), np.where(swap, other_value, value)
    high, f_high = np.where(swap, here, other), np.where(swap, value, other_value)
    for _ in range(steps):
        # Regula falsi, kept off the ends so that the bracket shrinks from both sides.
        share = np.divide(-f_low, f_high - f_low, out=np.full(p, 0.5), where=f_high > f_low)
        middle = low + np.clip(share, 0.15, 0.85) * (high - low)
        value = f(middle)
        under = value <= 0
        low, f_low = np.where(under, middle, low), np.where(under, value, f_low)
        high, f_high = np.where(under, high, middle), np.where(under, f_high, value)
    return low, high


def _approach(
    q: np.ndarray, x: np.ndarray, step: np.ndarray, u: np.ndarray, high: np.ndarray,
    left: np.ndarray, grid: Grid,
) -> np.ndarray:  # fmt: skip
    """Where the undershooting codes are still many steps short, move on towards the other end.

    Codes that all lie as far from the grid (on it, where the cut took nothing out) make f flat
    around 0 and steep beyond: the bracket stays wide, or many codes flip at one c. They are taken
    in the order in which they flip, up to the last that does not overshoot. left (p,) in place.
    """
    most = np.broadcast_to(np.abs(u * step).max(1) * np.diff(grid.values).max(), left.shape)
    for j in np.flatnonzero(left < -2 * most):
        s = step[min(int(j), len(step) - 1)]
        ratio = (u * _inverse(s)).astype(np.float32)
        reached = grid.round(x[j] + np.float32(high[j]) * ratio)
        moved = np.flatnonzero(reached != q[j])
        here, there = grid.value(q[j, moved]), grid.value(reached[moved])
        flips = ((here + there) / 2 - x[j, moved]) / ratio[moved]
        moved = moved[np.argsort(flips, kind="stable")]
        gain = (grid.value(reached[moved]) - grid.value(q[j, moved])) * (u * s)[moved]
        total = np.cumsum(gain)
        taken = int(np.searchsorted(total, -left[j], side="right"))
        if taken:
            q[j, moved[:taken]] = reached[moved[:taken]]
            left[j] += total[taken - 1]
    return q


def _joint_root(
    x: np.ndarray, step: np.ndarray, u: np.ndarray, const: np.ndarray, grid: Grid
) -> np.ndarray:
    """Indices with F(c) = U (s · grid(x + Uᵀc/s)) + const near zero in all k components.

    One root per direction with the others held, twice round; then damped Newton steps, of which
    the best is kept (F is a staircase, and a step may miss).
    """
    inverse = _inverse(step)
    ratio, weight = u[:, None] * inverse[None], u[:, None] * step[None]
    c = np.zeros((x.shape[0], len(u)))
    for _ in range(2):
        for i in range(len(u)):
            held = c.astype(np.float32)
            held[:, i] = 0.0
            wanted = x + (held @ u) * inverse
            c[:, i] = _root(wanted, ratio[i], weight[i], const[i], grid, c[:, i])[0]
    best, best_norm = grid.round(x), np.full(x.shape[0], np.inf)
    for _ in range(_NEWTON):
        wanted = x + (c.astype(np.float32) @ u) * inverse
        q = grid.round(wanted)
        left = (grid.value(q) * step).astype(np.float64) @ u.T.astype(np.float64) + const.T
        norm = np.linalg.norm(left, axis=1)
        better = norm < best_norm
        best[better], best_norm = q[better], np.minimum(norm, best_norm)
        inside = ((wanted > grid.values[0]) & (wanted < grid.values[-1])).astype(np.float32)
        slope = np.einsum("pm,im,jm->pij", inside, u, u, optimize=True) + 1e-3 * np.eye(len(u))
        c -= 0.7 * np.linalg.solve(slope, left[..., None])[..., 0]
    return best


def _mend_one(
    q: np.ndarray, pull: np.ndarray, left: np.ndarray, grid: Grid, picks: int
) -> np.ndarray:
    """`_mend` for one direction on an even grid with the same steps `pull` (m,) in all problems.

    What one step changes depends on the row alone, so the best is found in one sorted list. left
    (p,) is updated in place.
    """
    size = np.abs(pull)
    order = np.argsort(size)
    ranked = size[order]
    enough = 1e-4 * np.median(size[size > 0]) if size.any() else np.inf
    rows = np.flatnonzero(np.abs(left) > enough)
    for _ in range(picks):
        if not rows.size:
            break
        off = np.abs(left[rows])
        at = np.searchsorted(ranked, off)[:, None] + np.arange(-_WINDOW, _WINDOW)
        column = order[np.clip(at, 0, len(order) - 1)]
        move = -np.sign(left[rows])[:, None] * np.sign(pull[column])
        there = q[rows[:, None], column] + move
        after = np.abs(off[:, None] - size[column])
        after[(there < 0) | (there > grid.top)] = np.inf
        best = after.argmin(1)[:, None]
        better = np.take_along_axis(after, best, 1)[:, 0] < off
        rows, best = rows[better], best[better]
        i = np.take_along_axis(column[better], best, 1)[:, 0]
        step = np.take_along_axis(move[better], best, 1)[:, 0]
        q[rows, i] += step.astype(q.dtype)
        left[rows] += step * pull[i]
        rows = rows[np.abs(left[rows]) > enough]
    return q


def _mend(
    q: np.ndarray, step: np.ndarray, u: np.ndarray, left: np.ndarray, grid: Grid, picks: int
) -> np.ndarray:
    """Take the one code step that brings what is left nearest to zero, up to `picks` times.

    Only problems that are still off are looked at again. left (k, p) is updated in float64.
    """
    square = (u.astype(np.float64) ** 2).sum(0).astype(np.float32)
    s = np.broadcast_to(step, q.shape)
    enough = 1e-4 * np.median(np.abs(step)) * np.sqrt(np.median(square[square > 0]))
    rows = np.flatnonzero(np.abs(left).max(0) > enough)
    for _ in range(picks):
        if not rows.size:
            break
        at, here, steps = np.arange(rows.size), grid.value(q[rows]), s[rows]
        pull = 2 * (left[:, rows].T.astype(np.float32) @ u) * steps
        gain = np.zeros(rows.size)
        chosen, moved = np.zeros(rows.size, int), np.zeros(rows.size)
        for direction in (-1.0, 1.0):
            there = q[rows] + direction
            delta = grid.value(np.clip(there, 0, grid.top)) - here
            # |left + δ s u|² - |left|² = 2 δ s (left.u) + δ² s² |u|²; no move, no change.
            change = delta * (pull + delta * steps**2 * square)
            i = change.argmin(1)
            better = change[at, i] < gain
            gain = np.where(better, change[at, i], gain)
            chosen, moved = np.where(better, i, chosen), np.where(better, direction, moved)
        active = moved != 0
        r, i = rows[active], chosen[active]
        before = grid.value(q[r, i]).astype(np.float64)
        q[r, i] += moved[active].astype(q.dtype)
        delta64 = (grid.value(q[r, i]).astype(np.float64) - before) * s[r, i]
        left[:, r] += u[:, i].astype(np.float64) * delta64
        rows = r[np.abs(left[:, r]).max(0) > enough]
    return q


def _row_shifts(
    t: np.ndarray, u: np.ndarray, s: np.ndarray, b: np.ndarray, w: np.ndarray, grid: Grid,
    group: int, rounds: int,
) -> tuple[np.ndarray, np.ndarray] | None:  # fmt: skip
    """(r (k, out), w (k, in)): the row scalars of the two-sided form, w row-orthonormal.

    Alternates the roots over rows (Ŵ w = T w) and over columns (u^T Ŵ = 0), columns last in the
    caller. With several directions the rows are solved one w at a time. Rows are asked for no more
    than `_SPARED` of what one-sided rounding puts in the removed rows' place: the last part of it
    costs more error than it is worth.
    """
    rows, columns = t.shape
    along = _orthonormal(w)
    if along is None:
        return None
    k = len(u)
    r = np.zeros((len(along), rows))
    c = np.zeros((k, columns))
    wanted = t.astype(np.float32) @ along.T
    inverse = _inverse(s)

    grouped = along.reshape(len(along), -1, group)
    offsets = b.astype(np.float64) @ grouped.astype(np.float64).sum(-1).T

    spared = np.zeros((len(along), rows))

    def one_rows(start: int, measure: bool = False) -> None:
        # Steps and offsets belong to groups: they are spread by broadcasting, never repeated.
        part = slice(start, start + _ROWS)
        size = (-1, columns)
        inv, step = inverse[part, :, None], s[part, :, None]
        base = u[:, part].T @ c.astype(np.float32)
        base += t[part]
        base = base.reshape(*step.shape[:2], group)
        base -= b[part, :, None]
        base *= inv
        for i in range(len(along)):
            x = base
            for j in range(len(along)):
                if j != i:
                    x = x + r[j][part, None, None].astype(np.float32) * grouped[j] * inv
            ratio, weight = (grouped[i] * inv).reshape(size), (grouped[i] * step).reshape(size)
            const = offsets[part, i] - wanted[part, i]
            if measure:
                value = grid.value(grid.round(x.reshape(size)))
                spared[i][part] = np.einsum("pm,pm->p", value, weight) + const
                continue
            const = const - spared[i][part]
            r[i][part] = _root(x.reshape(size), ratio, weight, const, grid, r[i][part])[0]

    def one_group(g: int) -> None:
        part = slice(g * group, (g + 1) * group)
        step = s[:, g][None]
        x = _codes_wanted(t[:, part].T, step, b[:, g][None])
        for i in range(len(along)):
            x += along[i][part, None] * r[i][None].astype(np.float32) * _inverse(step)
        for i in range(k):
            y = x
            for j in range(k):
                if j != i:
                    y = y + c[j][part, None].astype(np.float32) * u[j][None] * _inverse(step)
            const = np.full(group, float(u[i].astype(np.float64) @ b[:, g]))
            ratio, weight = (u[i] * _inverse(step[0]))[None], (u[i] * step[0])[None]
            c[i][part] = _root(y, ratio, weight, const, grid, c[i][part])[0]

    for number in range(rounds):
        _parallel(one_group, range(columns // group))
        if number == 0:
            _parallel(partial(one_rows, measure=True), range(0, rows, _ROWS))
            put = float(np.linalg.norm(spared)) / max(float(np.linalg.norm(w)), 1e-30)
            spared *= min(1.0, _SPARED / max(put, 1e-30))
        _parallel(one_rows, range(0, rows, _ROWS))
    return r.astype(np.float32), along.astype(np.float32)


def _orthonormal(w: np.ndarray) -> np.ndarray | None:
    """Row-orthonormal basis of the removed rows; None when nothing was removed."""
    values, basis = np.linalg.svd(w.astype(np.float64), full_matrices=False)[1:]
    kept = basis[values > 1e-6 * max(values[0], 1e-30)] if values[0] > 0 else basis[:0]
    return kept.astype(np.float32) if len(kept) else None
