"""The last codes: single steps of the grid that bring what is left of U (s·q + b) to zero, cheaply.

A root of the staircase stops some steps short. Of all steps that would close the gap nearly alike,
the one that adds least to the rounding error is taken. NumPy only; sees no matrix, only problems
of m codes each.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from vauban.edits.grids import Grid

# What may stay, in units of a middling step: a finer sum costs more error than it is worth.
_ENOUGH = 1e-2
# Shortfalls in largest steps that `mend` is better at than `approach`.
_SHORT = 2
# Steps next in size that are compared, on either side.
_WINDOW = 16
# Steps per problem and direction, at most.
_PICKS = 24
# Moves that are tried in every combination: many where codes are few and their sums far apart.
_MOVES = (4, 12)
_WORK = 19
# Pairs of single steps that are tried, and rounds of it. Along one direction the cheapest of all
# are fine enough; along several, those that come nearest by themselves go with many others.
_PAIRS = {False: (96, 96), True: (96, 2048)}
_ROUNDS = 8
_AT_ONCE = 16


def approach(
    q: np.ndarray, x: np.ndarray, step: np.ndarray, u: np.ndarray, high: np.ndarray,
    left: np.ndarray, grid: Grid,
) -> np.ndarray:  # fmt: skip
    """Where the undershooting codes are still many steps short, move on towards the other end.

    Codes that all lie as far from the grid (on it, where the cut took nothing out) make f flat
    around 0 and steep beyond: the bracket stays wide, or many codes flip at one c. They are taken
    in the order in which they flip, up to the last that does not overshoot. left (p,) in place.
    """
    most = np.broadcast_to(np.abs(u * step).max(1) * np.diff(grid.values).max(), left.shape)
    rows = np.flatnonzero(left < -_SHORT * most)
    scale = step[np.minimum(rows, len(step) - 1)]
    ratio = np.divide(u, scale, out=np.zeros_like(scale), where=scale != 0)
    reached = grid.round(x[rows] + high[rows, None].astype(np.float32) * ratio)
    row, code = np.nonzero(reached != q[rows])
    # One code after another, problem by problem.
    at = rows[row]
    here, there = grid.value(q[at, code]), grid.value(reached[row, code])
    flips = ((here + there) / 2 - x[at, code]) / ratio[row, code]
    order = np.lexsort((flips, row))
    row, code, at = row[order], code[order], at[order]
    gain = (there - here)[order].astype(np.float64) * u[code] * scale[row, code]
    total = np.cumsum(gain)
    first = np.searchsorted(row, row)
    taken = total - (total - gain)[first] <= -left[at]
    q[at[taken], code[taken]] = reached[row[taken], code[taken]]
    np.add.at(left, at[taken], gain[taken])
    return q


def combine(
    q: np.ndarray, x: np.ndarray, step: np.ndarray, u: np.ndarray, left: np.ndarray,
    limit: np.ndarray, grid: Grid,
) -> np.ndarray:  # fmt: skip
    """Of all ways to move the few cheapest codes, the cheapest that brings |left| within limits.

    x (p, m) are the SHIFTED codes: at the root's shift the codes next to their rounding boundary
    cost nearly nothing to move, and their sums are dense. left (k, p) in float64, in place.
    """
    codes = q.shape[1]
    count = min(codes, int(np.clip(_WORK - np.log2(codes), *_MOVES)))
    value = grid.value(q)
    off = x - value
    there = np.clip(q + np.sign(off), 0, grid.top)
    gap = grid.value(there) - value
    cost = gap * (gap - 2 * off) * step**2
    cost[gap == 0] = np.inf
    columns = np.argpartition(cost, count - 1, axis=1)[:, :count]
    cost = np.take_along_axis(cost, columns, 1)
    possible = np.isfinite(cost)
    cost[~possible] = 0.0
    at = np.arange(len(q))[:, None]
    moved = np.take_along_axis(gap, columns, 1) * step[np.minimum(at, len(step) - 1), columns]
    subsets = _subsets(count)
    after = np.zeros((len(q), len(subsets)), np.float32)
    for i in range(len(u)):
        after += (left[i, :, None].astype(np.float32) + (moved * u[i, columns]) @ subsets.T) ** 2
    price = cost @ subsets.T
    fits = after <= limit**2
    best = np.where(fits.any(1), np.where(fits, price, np.inf).argmin(1), after.argmin(1))
    chosen = (subsets[best] > 0) & possible
    new = np.where(chosen, np.take_along_axis(there, columns, 1), np.take_along_axis(q, columns, 1))
    np.put_along_axis(q, columns, new, 1)
    left += np.einsum("pm,kpm->kp", moved * chosen, u[:, columns].astype(np.float64))
    return q


@lru_cache
def _subsets(count: int) -> np.ndarray:
    """(2^count, count) of 0 and 1."""
    return (np.arange(2**count)[:, None] >> np.arange(count) & 1).astype(np.float32)


def enough(step: np.ndarray, u: np.ndarray) -> np.ndarray:
    """What may stay of |left|, (1 or p, 1); everything where there are no steps or no u."""
    size = np.sqrt((u**2).sum(0))
    used = size > 0
    middling = np.median(size[used]) if used.any() else 0.0
    if middling and not used.all():
        step = step[:, used]
    limit = _ENOUGH * middling * np.abs(step).mean(1, keepdims=True)
    return np.where(limit > 0, limit, np.inf)


def mend(
    q: np.ndarray, x: np.ndarray, step: np.ndarray, u: np.ndarray, left: np.ndarray,
    limit: np.ndarray, grid: Grid,
) -> np.ndarray:  # fmt: skip
    """Move single codes until |left| is within `limit`, at the least added error.

    q, x (p, m) indices and wanted codes; step (1 or p, m); u (k, m); left (k, p), updated in
    float64; limit (1 or p, 1). Each time the cheapest step that suffices; where none does, the one
    that comes nearest. Only problems that are still off are looked at again.
    """
    limit = np.broadcast_to(limit**2, (len(q), 1))
    # With one direction and the same steps everywhere the best are found in one sorted list.
    ranked, order = np.empty(0), None
    if grid.uniform and len(u) == len(step) == 1:
        pull = np.abs(u[0] * step[0])
        order = np.argsort(pull)
        ranked = pull[order]
    every = np.arange(q.shape[1])[None]
    rows = np.flatnonzero((left**2).sum(0) > limit[:, 0])
    for _ in range(_PICKS * len(u)):
        if not rows.size:
            break
        columns = every
        if order is not None:
            near = np.searchsorted(ranked, np.abs(left[0, rows]))[:, None]
            columns = order[np.clip(near + np.arange(-_WINDOW, _WINDOW), 0, len(order) - 1)]
        at = rows[:, None]
        here, steps = q[at, columns], step[np.minimum(at, len(step) - 1), columns]
        off = left[:, rows].astype(np.float32)[..., None]
        along = u[:, columns] if columns is not every else u[:, None]
        # |left + δ s u|² can only shrink for δ s (left.u) < 0.
        slope = (off * along).sum(0) if columns is not every else off[..., 0].T @ u
        move = -np.sign(slope) * np.sign(steps)
        value = grid.value(here)
        there = here + move
        delta = grid.value(np.clip(there, 0, grid.top)) - value
        after = ((off + along * (delta * steps)) ** 2).sum(0)
        # (x - value - δ)² - (x - value)², times s².
        cost = delta * (delta - 2 * (x[at, columns] - value)) * steps**2
        after[delta == 0] = np.inf
        suffices = after <= limit[rows]
        best = after.argmin(1)
        cheap = np.where(suffices, cost, np.inf).argmin(1)
        best = np.where(suffices.any(1), cheap, best)[:, None]
        better = np.take_along_axis(after, best, 1) < (off**2).sum(0)
        r = np.flatnonzero(better)
        i = np.take_along_axis(np.broadcast_to(columns, after.shape), best, 1)[r, 0]
        taken = np.take_along_axis(delta, best, 1)[r, 0].astype(np.float64)
        q[rows[r], i] += np.take_along_axis(move, best, 1)[r, 0].astype(q.dtype)
        scale = step[np.minimum(rows[r], len(step) - 1), i]
        left[:, rows[r]] += u[:, i].astype(np.float64) * taken * scale
        rows = rows[r]
        rows = rows[(left[:, rows] ** 2).sum(0) > limit[rows, 0]]
    return q


def pair(
    q: np.ndarray, x: np.ndarray, step: np.ndarray, u: np.ndarray, left: np.ndarray,
    limit: np.ndarray, grid: Grid,
) -> np.ndarray:  # fmt: skip
    """Where no single step helps any more, move two codes at once: the cheapest pair that does.

    Equal coordinates have nearly equal steps, and with several directions a step that mends one
    harms another: their differences are what is fine enough. Arguments as for `mend`.
    """
    limit = np.broadcast_to(limit**2, (len(q), 1))
    off = np.flatnonzero((left**2).sum(0) > limit[:, 0])
    for first in range(0, len(off), _AT_ONCE):
        _pair(q, x, step, u, left, grid, limit, off[first : first + _AT_ONCE])
    return q


def _pair(
    q: np.ndarray, x: np.ndarray, step: np.ndarray, u: np.ndarray, left: np.ndarray, grid: Grid,
    limit: np.ndarray, rows: np.ndarray,
) -> None:  # fmt: skip
    """`pair` for a few problems, in place: every pair of theirs is held at once."""
    for _ in range(_ROUNDS):
        if not rows.size:
            break
        there, pull, cost = _steps(q, x, step, u, grid, rows)
        off = left[:, rows].astype(np.float32)
        alone = ((off[..., None] + pull) ** 2).sum(0)
        alone[~np.isfinite(cost)] = np.inf
        several = len(u) > 1
        counts = [min(count, cost.shape[1]) for count in _PAIRS[several]]
        order = (alone if several else cost, cost)
        first, second = (
            np.argpartition(by, count - 1, axis=1)[:, :count]
            for by, count in zip(order, counts, strict=True)
        )
        one, two = (np.take_along_axis(pull, at[None], 2) for at in (first, second))
        after = 2 * np.einsum("kpa,kpb->pab", off[..., None] + one, two, optimize=True)
        after += np.take_along_axis(alone, first, 1)[:, :, None] + (two**2).sum(0)[:, None, :]
        # A code moves once: two steps of the same one are no pair.
        codes = q.shape[1]
        after[(first % codes)[:, :, None] == (second % codes)[:, None, :]] = np.inf
        price = [np.take_along_axis(cost, at, 1) for at in (first, second)]
        after[~np.isfinite(price[1])[:, None, :].repeat(counts[0], 1)] = np.inf
        total = (price[0][:, :, None] + price[1][:, None, :]).reshape(len(rows), -1)
        flat = after.reshape(len(rows), -1)
        suffices = flat <= limit[rows]
        cheap = np.where(suffices, total, np.inf).argmin(1)
        best = np.where(suffices.any(1), cheap, flat.argmin(1))
        found = np.take_along_axis(flat, best[:, None], 1)[:, 0]
        n = np.flatnonzero(found < 0.98 * (off**2).sum(0))
        for taken in (first[n, best[n] // counts[1]], second[n, best[n] % counts[1]]):
            i = taken % codes
            gap = grid.value(there[n, taken]) - grid.value(q[rows[n], i])
            scale = step[np.minimum(rows[n], len(step) - 1), i].astype(np.float64)
            left[:, rows[n]] += u[:, i].astype(np.float64) * gap * scale
            q[rows[n], i] = there[n, taken]
        rows = rows[n]
        rows = rows[(left[:, rows] ** 2).sum(0) > limit[rows, 0]]


def _steps(
    q: np.ndarray, x: np.ndarray, step: np.ndarray, u: np.ndarray, grid: Grid, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All single steps of some problems, m up and then m down: where to, pull (k, p, 2m), cost.

    At the end of the grid a step goes nowhere and costs without end.
    """
    steps = step[rows] if len(step) > 1 else step
    value = grid.value(q[rows])
    both = []
    for way in (1, -1):
        there = np.clip(q[rows] + way, 0, grid.top)
        gap = grid.value(there) - value
        price = gap * (gap - 2 * (x[rows] - value)) * steps**2
        both.append((there, gap * steps, np.where(gap == 0, np.inf, price)))
    there, moved, price = (np.concatenate(parts, axis=1) for parts in zip(*both, strict=True))
    pull = moved.astype(np.float32) * np.tile(u, 2)[:, None]
    return there, pull, price
