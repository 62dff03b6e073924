"""The two classes read once: moments of the fitting prompts, projections of the held-out ones.

A held-out third of the distinct prompts scores the layers. Streams the activations, or keeps them
where they have to be winsorized. Knows prompts and activations; chooses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban._common import Progress
from vauban.activations import (
    ActivationMoments,
    collect_activations,
    stream_activations,
    winsorize,
)
from vauban.directions import separation
from vauban.directions.mean_estimators import Estimator, mean_difference


@dataclass(frozen=True, eq=False)
class ClassMoments:
    """A class's moments over its fitting and its held-out prompts, and the latter's projections.

    `projections` (n, L+1, P) are on the unit directions of the fitting prompts.
    """

    fit: ActivationMoments
    held_out: ActivationMoments
    projections: np.ndarray

    @property
    def whole(self) -> ActivationMoments:
        """Moments (L+1, P, d) over all prompts."""
        return ActivationMoments().merge(self.fit).merge(self.held_out)

    @property
    def mean(self) -> mx.array:
        """(L+1, P, d) over all prompts."""
        return self.whole.mean


Split = tuple[list[int], list[int]]
"""Indices of the fitting and of the held-out prompts; the same list where nothing is held out."""
Read = Callable[[str, list[int]], Iterator[mx.array]]
"""Activations (B, L+1, P, d) of some prompts of a class, batch by batch."""


def split_prompts(prompts: list[Any], seed: int) -> Split:
    """A third of the distinct prompts is held out; with fewer than 6 of them nothing is.

    A repeated prompt is in one part alone: it would be scored on a direction that it helped to fit.
    """
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(str(prompt), []).append(row)
    if len(rows) < 6:
        everything = list(range(len(prompts)))
        return everything, everything
    groups = list(rows.values())
    order = np.random.default_rng(seed).permutation(len(groups))
    third = len(groups) // 3
    fitting, held_out = (
        sorted(r for g in part for r in groups[g]) for part in (order[third:], order[:third])
    )
    return fitting, held_out


def streamed(
    model: nn.Module, tokenizer: Any, sets: dict[str, list[Any]], splits: dict[str, Split],
    positions: tuple[int, ...], batch_size: int | None, progress: Progress | None,
) -> Read:  # fmt: skip
    """Read when asked: memory does not grow with the prompts."""
    total = sum(len(part) for split in splits.values() for part in split)
    seen = 0

    def read(name: str, rows: list[int]) -> Iterator[mx.array]:
        nonlocal seen
        prompts = [sets[name][row] for row in rows]
        for batch, values in stream_activations(
            model, tokenizer, prompts, positions=positions, batch_size=batch_size
        ):
            yield values
            seen += len(batch)
            if progress:
                progress("measure", seen, total)

    return read


def stored(
    model: nn.Module, tokenizer: Any, sets: dict[str, list[Any]], positions: tuple[int, ...],
    clip_quantile: float, batch_size: int | None, progress: Progress | None,
    residuals: list[int] | None = None,
) -> Read:  # fmt: skip
    """All activations read at once and winsorized over both classes: all `residuals`, or some."""
    prompts = [prompt for group in sets.values() for prompt in group]

    def tell(_: str, done: int, total: int) -> None:
        if progress:
            progress("measure", done, total)

    values = collect_activations(
        model, tokenizer, prompts, positions=positions, batch_size=batch_size, progress=tell
    ).values
    if residuals is None:
        values = winsorize(values, clip_quantile)
    else:
        rows = mx.array(residuals)
        values[:, rows] = winsorize(values[:, rows], clip_quantile)
    ends = np.cumsum([len(group) for group in sets.values()])
    parts = dict(zip(sets, mx.split(values, ends[:-1].tolist()), strict=True))

    def read(name: str, rows: list[int]) -> Iterator[mx.array]:
        yield parts[name][mx.array(rows)]

    return read


def reduce_classes(
    read: Read, splits: dict[str, Split], estimate: Estimator = mean_difference
) -> dict[str, ClassMoments]:
    """Moments of the fitting prompts, then the held-out ones' projections on their direction."""
    fit = {name: ActivationMoments() for name in splits}
    for name, (fitting, _) in splits.items():
        for values in read(name, fitting):
            fit[name].update(values)
    units = unit_rows(estimate(fit["harmless"], fit["harmful"]))
    classes = {}
    for name, (fitting, held_out) in splits.items():
        moments, projections = ActivationMoments(), []
        for values in read(name, held_out):
            projections.append(np.array((values * units).sum(axis=-1)))
            # Prompts that are not held out were counted already.
            if held_out is not fitting:
                moments.update(values)
        classes[name] = ClassMoments(fit[name], moments, np.concatenate(projections))
    return classes


def unit_rows(difference: mx.array) -> mx.array:
    return difference / mx.maximum(mx.linalg.norm(difference, axis=-1, keepdims=True), 1e-30)


def score_layers(low: ClassMoments, high: ClassMoments) -> dict[str, np.ndarray]:
    """Per (residual, position) scores on the held-out projections."""
    negative = low.projections.astype(np.float64)
    positive = high.projections.astype(np.float64)
    a, b = np.array(low.mean, np.float64), np.array(high.mean, np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return {
        "gap": separation.gap(negative, positive),
        "cohens_d": separation.cohens_d(negative, positive),
        "auc": separation.auc(negative, positive),
        "cosine": (a * b).sum(-1) / np.maximum(norms, 1e-30),
        "silhouette": separation.silhouette(negative, positive),
    }
