"""Classifier after classifier on a stack of problems, each one's direction taken off the rows.

All problems take the same step together and leave the stack when their own search ends. Knows
coordinates in a span (float64, on MLX's CPU stream) and labels; draws no split and scales nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from vauban._arrays import integers
from vauban.directions.linear import FLOAT, Span, solve


@dataclass(frozen=True)
class Rule:
    """When a search ends, and which classifiers it accepts."""

    max_rank: int
    threshold: float
    patience: int


@dataclass(eq=False)
class Search:
    """What the search on one problem has tried and accepted.

    `places` number the accepted classifiers among those tried; `directions` (k, r) are theirs, in
    span coordinates and in the order of extraction, once the search has ended.
    """

    tried: list[float] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    failures: int = 0
    directions: mx.array = field(default_factory=lambda: mx.zeros((0, 0)))

    def note(self, accuracy: float, rule: Rule) -> None:
        """One more classifier; below the threshold it is set aside, not accepted."""
        if accuracy >= rule.threshold:
            self.places.append(len(self.tried))
            self.accepted.append(accuracy)
            self.failures = 0
        else:
            self.failures += 1
        self.tried.append(accuracy)

    def ended(self, rule: Rule, r: int) -> bool:
        """Enough accepted, too many failures in a row, or nothing left of the r dimensions."""
        return (
            len(self.places) >= rule.max_rank
            or self.failures >= rule.patience
            or len(self.tried) >= r
        )


def search_stack(
    span: Span, held: mx.array, y: np.ndarray, y_held: np.ndarray, kind: str,
    C: float, rule: Rule, tell: Callable[[int], None],
) -> list[Search]:  # fmt: skip
    """A search for each problem of a stack, over the coordinates of its training rows.

    `held` (b, m, r) are the held-out rows' coordinates, `y` (n,) and `y_held` (m,) the bool labels
    that all problems share. A problem that ends leaves the stack; `tell` hears how many have.
    """
    x = span.coordinates
    stack, _, r = x.shape
    searches = [Search() for _ in range(stack)]
    here = np.arange(stack)
    smallest = 1e-9 * mx.linalg.norm(x, axis=[1, 2])
    truth = mx.array(y_held)
    # Directions set aside stay here, so that the next classifier looks elsewhere, but not in V.
    removed = mx.zeros((stack, 0, r), FLOAT)
    while True:
        w, bias = solve(kind, x, y, C, span.d)
        for _ in range(2 if removed.shape[1] else 0):
            # Orthogonal already up to rounding, which two passes take off.
            w = w - ((w[:, None] @ removed.swapaxes(1, 2)) @ removed)[:, 0]
        norm = mx.linalg.norm(w, axis=-1)
        empty = (norm <= 1e-9) | (mx.linalg.norm(x, axis=[1, 2]) <= smallest)
        right = ((held @ w[..., None])[..., 0] + bias[:, None] > 0) == truth
        counts = integers(right.sum(axis=-1))
        v = (w / mx.maximum(norm, 1e-300)[:, None])[:, None]
        removed = mx.concatenate([removed, v], axis=1)
        left = []
        for row, (problem, nothing) in enumerate(zip(here, np.array(empty), strict=True)):
            search = searches[problem]
            if not nothing:
                search.note(counts[row] / y_held.size, rule)
            if nothing or search.ended(rule, r):
                search.directions = removed[row][mx.array(search.places, dtype=mx.int32)]
            else:
                left.append(row)
        if len(left) < len(here):
            tell(stack - len(left))
            mx.eval([search.directions for search in searches])
            if not left:
                break
            kept = mx.array(left)
            here = here[left]
            x, held, v, removed, smallest = (a[kept] for a in (x, held, v, removed, smallest))
        # x <- x (I - v vᵀ), row by row, and the same off the held-out rows.
        x = x - (x @ v.swapaxes(1, 2)) @ v
        held = held - (held @ v.swapaxes(1, 2)) @ v
        mx.eval(x, held, removed)
    return searches
