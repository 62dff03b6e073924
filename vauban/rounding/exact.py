"""Round codes so that each is near its wanted value and a weighted sum of all comes out as asked.

Minimising Σ err² subject to u·(s q) + const = 0 leads to one number c per problem: round x + c u/s.
The sum grows with c in steps of single codes, so its root is bracketed, the flips in the bracket
are made in their order, and single codes close what remains. Sees p problems of m codes each, no
matrix.
"""

from __future__ import annotations

import numpy as np

from vauban.rounding.grid import Grid, inverse

# The first bracket, in distances that the expected slope gives, and how often it doubles.
_REACH, _DOUBLINGS = 1.5, 10
# Refinements of the bracket; the flips that are left in it are sorted.
_REFINEMENTS = 3
# Newton steps for several directions.
_NEWTON = 8
# What may remain of the sum, in middling steps: less than float32 makes of it at 8 bits, and small
# enough for 1e-3 of a direction in the smallest matrices (64 rows of 4 bits).
_TOLERANCE = 1e-2
# Codes that may close what remains; how many of them are tried in pairs first and last, twice as
# many each time; and problems whose pairs are held at once.
_CANDIDATES, _PAIRED, _TOGETHER = 256, (32, 128), 32
# Pairs that a problem may take, for each direction: a problem that stops short of one very large
# step needs many.
_CLOSINGS = 24


def round_exact(
    x: np.ndarray, step: np.ndarray, u: np.ndarray, const: np.ndarray, grid: Grid
) -> np.ndarray:
    """Indices (p, m), as floats, near the wanted codes x (p, m), with U (s·q) + const = 0.

    step (1 or p, m); u (k, m); const (k, p) in float64.
    """
    ratio = u * inverse(step) if len(u) == 1 else None
    if ratio is None:
        q, x = _joint(x, step, u, const, grid)
        left = missed(q, step, u, const, grid)
    else:
        low, high = bracket(x, ratio, u * step, const[0], grid)
        q = _shifted(x, ratio, low, grid)
        left = missed(q, step, u, const, grid)
        c = _flip(q, x, ratio, u * step, low, high, left[0], grid)
        x = x + c[:, None].astype(np.float32) * ratio
    return close_gap(q, x, step, u, left, grid)


def missed(
    q: np.ndarray, step: np.ndarray, u: np.ndarray, const: np.ndarray, grid: Grid
) -> np.ndarray:
    """U (s·q) + const (k, p) in float64."""
    value, u = grid.value(q).astype(np.float64), u.astype(np.float64)
    moved: np.ndarray = (u * step) @ value.T if len(step) == 1 else u @ (value * step).T
    return const + moved


def _shifted(x: np.ndarray, ratio: np.ndarray, c: np.ndarray, grid: Grid) -> np.ndarray:
    """Indices of x + c u/s, (p, m)."""
    moved = c[:, None].astype(np.float32) * ratio
    moved += x
    return grid.round(moved, out=moved)


def bracket(
    x: np.ndarray, ratio: np.ndarray, weight: np.ndarray, const: np.ndarray, grid: Grid
) -> tuple[np.ndarray, np.ndarray]:
    """Shifts (p,) on either side of the root of f(c) = Σ u s · grid(x + c u/s) + const.

    ratio is u/s and weight u s, (1 or p, m). f(low) <= 0 <= f(high), where codes within the grid
    can reach both signs.
    """

    def f(index: np.ndarray, weight: np.ndarray, const: np.ndarray) -> np.ndarray:
        value = grid.value(index)
        if len(weight) == 1:
            return const + value @ weight[0]
        total: np.ndarray = const + np.einsum("pm,pm->p", value, weight)
        return total

    slope = (weight * ratio).sum(1)
    slope = np.where(slope > 0, slope, 1.0)
    near = np.zeros(len(x))
    at_near = _shifted(x, ratio, near, grid)
    f_near = f(at_near, weight, const)
    # Walk against the sign of f, doubling, until it changes.
    reach = -_REACH * f_near / slope
    far = near + reach
    at_far = _shifted(x, ratio, far, grid)
    f_far = f(at_far, weight, const)
    for _ in range(_DOUBLINGS):
        rows = np.flatnonzero((f_near <= 0) == (f_far <= 0))
        if not rows.size:
            break
        near[rows], f_near[rows], at_near[rows] = far[rows], f_far[rows], at_far[rows]
        reach[rows] *= 2
        far[rows] += reach[rows]
        own_ratio, own_weight = (a if len(a) == 1 else a[rows] for a in (ratio, weight))
        at_far[rows] = _shifted(x[rows], own_ratio, far[rows], grid)
        f_far[rows] = f(at_far[rows], own_weight, const[rows])
    swap = f_near > 0
    low, f_low = np.where(swap, far, near), np.where(swap, f_far, f_near)
    high, f_high = np.where(swap, near, far), np.where(swap, f_near, f_far)
    # A code that is the same at both ends is so between them, and most are.
    moving = np.flatnonzero((at_near != at_far).any(0))
    weight = weight[:, moving]
    const = f_near - f(at_near[:, moving], weight, np.zeros(len(x)))
    x, ratio = x[:, moving], ratio[:, moving]
    for _ in range(_REFINEMENTS):
        # Regula falsi, kept off the ends so that the bracket shrinks from both sides.
        share = np.divide(-f_low, f_high - f_low, out=np.full(len(x), 0.5), where=f_high > f_low)
        middle = low + np.clip(share, 0.15, 0.85) * (high - low)
        f_middle = f(_shifted(x, ratio, middle, grid), weight, const)
        under = f_middle <= 0
        low, f_low = np.where(under, middle, low), np.where(under, f_middle, f_low)
        high, f_high = np.where(under, high, middle), np.where(under, f_high, f_middle)
    return low, high


def _flip(
    q: np.ndarray, x: np.ndarray, ratio: np.ndarray, weight: np.ndarray, low: np.ndarray,
    high: np.ndarray, left: np.ndarray, grid: Grid,
) -> np.ndarray:  # fmt: skip
    """Move codes from `low` on towards `high` in the order in which they flip; the shifts reached.

    Up to the last flip that does not overshoot. q and left (p,), what q misses, in place.
    """
    end = _shifted(x, ratio, high, grid)
    row, code = np.nonzero(end != q)
    own = np.minimum(row, len(ratio) - 1)
    near, far = grid.value(q[row, code]), grid.value(end[row, code])
    flips = ((near + far) / 2 - x[row, code]) / ratio[own, code]
    order = np.lexsort((flips, row))
    row, code, flips = row[order], code[order], flips[order]
    gain = (far - near)[order].astype(np.float64) * weight[own[order], code]
    total = np.cumsum(gain)
    first = np.searchsorted(row, np.arange(len(q)))[row]
    taken = total - (total - gain)[first] <= -left[row]
    row, code = row[taken], code[taken]
    q[row, code] = end[row, code]
    np.add.at(left, row, gain[taken])
    reached = low.copy()
    reached[row] = flips[taken]
    return reached


def _joint(
    x: np.ndarray, step: np.ndarray, u: np.ndarray, const: np.ndarray, grid: Grid
) -> tuple[np.ndarray, np.ndarray]:
    """Indices with U (s·q) + const near zero in all k components, and the shifted codes.

    One root per direction beside the others gives a start; damped Newton steps follow, of which the
    best is kept: the sum is a staircase, and a step may miss. Its expected slope is U Uᵀ over the
    codes that are not at the grid's ends.
    """
    inv = inverse(step)
    c = np.zeros((len(x), len(u)))
    for i in range(len(u)):
        others = c.astype(np.float32)
        low, high = bracket(x + (others @ u) * inv, u[i] * inv, u[i] * step, const[i], grid)
        c[:, i] = (low + high) / 2
    best, reached, norm = x.copy(), x.copy(), np.full(len(x), np.inf)
    for _ in range(_NEWTON):
        wanted = x + (c.astype(np.float32) @ u) * inv
        q = grid.round(wanted.copy())
        left = missed(q, step, u, const, grid).T
        size = np.linalg.norm(left, axis=1)
        better = size < norm
        best[better], reached[better], norm[better] = q[better], wanted[better], size[better]
        inside = ((wanted > grid.values[0]) & (wanted < grid.values[-1])).astype(np.float32)
        slope = np.einsum("pm,im,jm->pij", inside, u, u, optimize=True) + 1e-3 * np.eye(len(u))
        c -= 0.7 * np.linalg.solve(slope, left[..., None])[..., 0]
    return best, reached


def tolerance(step: np.ndarray, u: np.ndarray) -> np.ndarray:
    """What may remain of |U (s·q) + const|, (1 or p, 1): a share of the median |u| and mean step.

    Everything where there are no steps or no u.
    """
    size = np.sqrt((u**2).sum(0))
    used = size > 0
    if not used.any():
        return np.full((len(step), 1), np.inf)
    limit = _TOLERANCE * np.median(size[used]) * np.abs(step[:, used]).mean(1, keepdims=True)
    return np.where(limit > 0, limit, np.inf)


def close_gap(
    q: np.ndarray, x: np.ndarray, step: np.ndarray, u: np.ndarray, left: np.ndarray, grid: Grid
) -> np.ndarray:
    """Move single codes, one or two at a time, until |left| is tolerable, at the least added error.

    q, x (p, m) indices and wanted codes; step (1 or p, m); u (k, m); left (k, p) in float64; q and
    left in place. Of all pairs of a cheap step that shrinks |left| and one that does not (or none)
    the cheapest that suffices is taken; where none does, the one that comes nearest: differences of
    steps are finer than steps.
    """
    limit = np.broadcast_to(tolerance(step, u) ** 2, (len(q), 1))
    open_rows = np.flatnonzero((left**2).sum(0) > limit[:, 0])
    for first in range(0, len(open_rows), _TOGETHER):
        rows, count = open_rows[first : first + _TOGETHER], _PAIRED[0]
        for _ in range(_CLOSINGS * len(u)):
            nearer = _take_pairs(q, x, step, u, left, grid, limit, rows, count)
            # More pairs are tried next time; where there are no more nothing would change.
            nearer |= count < _PAIRED[1]
            rows = rows[nearer & ((left[:, rows] ** 2).sum(0) > limit[rows, 0])]
            count = min(2 * count, _PAIRED[1])
            if not rows.size:
                break
    return q


def _take_pairs(
    q: np.ndarray, x: np.ndarray, step: np.ndarray, u: np.ndarray, left: np.ndarray, grid: Grid,
    limit: np.ndarray, rows: np.ndarray, count: int,
) -> np.ndarray:  # fmt: skip
    """Move the best pair of `count` steps each for some problems; whether that came nearer."""
    used = np.flatnonzero(u.any(0))
    columns = used[:: max(1, len(used) // _CANDIDATES)]
    count = min(count, len(columns))
    at = np.ix_(rows, columns)
    steps = step[np.ix_(rows if len(step) > 1 else np.zeros(1, int), columns)]
    index, off = q[at], x[at] - grid.value(q[at])

    def cheapest(move: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of the steps by `move` the cheapest: column, new index, change of value, cost."""
        there = np.clip(index + move, 0, grid.top)
        gap = grid.value(there) - grid.value(index)
        # (off - gap)² - off²; past the grid's end there is no step.
        cost = np.where(gap == 0, np.inf, gap * (gap - 2 * off) * steps**2)
        best = np.argpartition(cost, count - 1, axis=1)[:, :count]
        there, gap, cost = (np.take_along_axis(a, best, 1) for a in (there, gap * steps, cost))
        return columns[best], there, gap, cost

    pull = np.sign(np.einsum("kp,km->pm", left[:, rows], u[:, columns]) * steps)
    first, second = cheapest(-pull), cheapest(pull)
    none = np.zeros((len(rows), 1), np.float32)
    total = first[3][:, :, None] + np.concatenate([none, second[3]], 1)[:, None]
    total[:, :, 1:][first[0][:, :, None] == second[0][:, None]] = np.inf
    after = np.zeros_like(total)
    for i in range(len(u)):
        one = left[i, rows, None].astype(np.float32) + u[i, first[0]] * first[2]
        two = np.concatenate([none, u[i, second[0]] * second[2]], 1)
        after += (one[:, :, None] + two[:, None]) ** 2
    after[~np.isfinite(total)] = np.inf
    total[after > limit[rows][:, :, None]] = np.inf
    total, after = total.reshape(len(rows), -1), after.reshape(len(rows), -1)
    chosen = np.where(np.isfinite(total).any(1), total.argmin(1), after.argmin(1))
    nearest = np.take_along_axis(after, chosen[:, None], 1)[:, 0]
    nearer = nearest < (left[:, rows] ** 2).sum(0)
    kept = np.flatnonzero(nearer)
    one, two = np.divmod(chosen, count + 1)
    paired = kept[two[kept] > 0]
    for n, pick, moves in ((kept, one, first), (paired, two - 1, second)):
        i, there, moved, _ = (a[n, pick[n]] for a in moves)
        q[rows[n], i] = there
        left[:, rows[n]] += u[:, i].astype(np.float64) * moved
    return nearer
