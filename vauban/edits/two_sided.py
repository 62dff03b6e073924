"""The shifts of two-sided rounding: c per column for u^T Ŵ = 0, r per row for Ŵ w = T w.

w = v/|v| is the removed row: without the second condition an input along it meets, in place of
what was removed, a fixed pattern as large. NumPy only; rounds nothing, sees no model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from vauban.edits.problem import Problem
from vauban.edits.staircase import inverse, root

# Leak that is left in place, in units of what was removed: the last of it costs most.
_SPARED = 0.065
# Rows that are solved together: their arrays should stay in a core's cache.
_ROWS = 16
_TABLE_ROWS = 64


@dataclass(frozen=True, eq=False)
class Shifts:
    """What is added to T before it is rounded: leftᵀ right, left (n, out) and right (n, in).

    For a matrix left holds u and r, right holds c and w; for a table r and u.
    """

    left: np.ndarray
    right: np.ndarray

    def shifted(self, t: np.ndarray, rows: slice) -> np.ndarray:
        """T + leftᵀ right in some rows, `t` being T there."""
        moved: np.ndarray = self.left[:, rows].T @ self.right
        moved += t
        return moved


def parallel(work: Callable[[Any], None], items: Iterable[Any]) -> None:
    """NumPy releases the interpreter lock in its loops, so threads use all cores."""
    todo = list(items)
    if len(todo) == 1:
        work(todo[0])
        return
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        list(pool.map(work, todo))


@contextmanager
def one_behind() -> Iterator[Callable[..., None]]:
    """Gives `do(work, *arguments)`, which returns at once unless the work before is not done yet.

    So that NumPy takes in one block while mlx makes the next; no more than two are held.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        last: list[Future[None]] = []

        def do(work: Callable[..., None], *arguments: Any) -> None:
            if last:
                last.pop().result()
            last.append(pool.submit(work, *arguments))

        yield do
        if last:
            last.pop().result()


def find_shifts(
    asked: Problem, removed: np.ndarray, rounds: int, start: Shifts | None = None
) -> Shifts | None:
    """Alternate the roots over columns and over rows, `rounds` times; None when nothing is removed.

    removed (j, in). With several directions one root is found at a time. Rows are asked for no more
    than `_SPARED` of what one-sided rounding puts in the removed rows' place.
    """
    rows, columns = asked.shape
    t, u, s, b = asked.target, asked.basis, asked.steps, asked.offsets
    grid, group = asked.grid, asked.group
    w = orthonormal(removed)
    if w is None:
        return None
    c = np.zeros((len(u), columns), np.float32)
    if start is not None:
        c[:] = start.right[: len(u)]
    r = np.zeros((len(w), rows), np.float32)
    along = t @ w.T
    grouped = w.reshape(len(w), -1, group)
    offsets = b.astype(np.float64) @ grouped.astype(np.float64).sum(-1).T
    spared = np.zeros((len(w), rows))
    inverses = inverse(s)

    def one_rows(first: int, measure: bool = False) -> None:
        # Steps and offsets belong to groups: they are spread by broadcasting, never repeated.
        part = slice(first, first + _ROWS)
        inv, step = inverses[part, :, None], s[part, :, None]
        base = u[:, part].T @ c
        base += t[part]
        base = base.reshape(*step.shape[:2], group)
        base -= b[part, :, None]
        base *= inv
        for i in range(len(w)):
            x = base
            for j in range(len(w)):
                if j != i:
                    x = x + r[j][part, None, None] * grouped[j] * inv
            x = x.reshape(-1, columns)
            weight = (grouped[i] * step).reshape(x.shape)
            const = offsets[part, i] - along[part, i]
            if measure:
                value = grid.value(grid.round(x.copy()))
                spared[i][part] = np.einsum("pm,pm->p", value, weight) + const
                continue
            ratio = (grouped[i] * inv).reshape(x.shape)
            const = const - spared[i][part]
            r[i][part] = root(x, ratio, weight, const, grid, r[i][part])[2]

    def one_group(g: int) -> None:
        part = slice(g * group, (g + 1) * group)
        inv = inverses[:, g][None]
        x, step, const = asked.columns(part)
        for i in range(len(w)):
            x += w[i][part, None] * (r[i] * inv)
        for i in range(len(u)):
            y = x
            for j in range(len(u)):
                if j != i:
                    y = y + c[j][part, None] * (u[j] * inv)
            c[i][part] = root(y, u[i] * inv, u[i] * step, const[i], grid, c[i][part])[2]

    for number in range(rounds):
        if start is None or number > 0:
            parallel(one_group, range(columns // group))
        if number == 0:
            parallel(partial(one_rows, measure=True), range(0, rows, _ROWS))
            put = float(np.linalg.norm(spared)) / max(float(np.linalg.norm(removed)), 1e-30)
            spared *= min(1.0, _SPARED / max(put, 1e-30))
            if start is not None:
                r[:] = start.left[len(u) :]
        parallel(one_rows, range(0, rows, _ROWS))
    return Shifts(np.concatenate([u, r]), np.concatenate([c, w]))


def row_shifts(asked: Problem) -> Shifts:
    """The same for a table (rows, d), whose rows are asked one by one: T + rᵀ u."""
    u = asked.basis
    r = np.zeros((len(u), asked.shape[0]), np.float32)

    def some(first: int) -> None:
        part = slice(first, first + _TABLE_ROWS)
        x, step, const = asked.rows(part)
        inv = inverse(step)
        for i in range(len(u)):
            y = x + (r[:i, part].T @ u[:i]) * inv
            r[i, part] = root(y, u[i] * inv, u[i] * step, const[i], asked.grid)[2]

    parallel(some, range(0, asked.shape[0], _TABLE_ROWS))
    return Shifts(r, u)


def orthonormal(w: np.ndarray) -> np.ndarray | None:
    """Row-orthonormal basis of the removed rows; None when nothing was removed."""
    values, basis = np.linalg.svd(w.astype(np.float64), full_matrices=False)[1:]
    kept = basis[values > 1e-6 * max(values[0], 1e-30)] if values[0] > 0 else basis[:0]
    return kept.astype(np.float32) if len(kept) else None
