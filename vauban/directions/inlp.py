"""Iterative null-space projection (Ravfogel et al. 2020): classifier after classifier, projected.

Works in the span of the training rows and keeps the directions in the order they were found.
Knows arrays only; never forms a d x d matrix unless one is asked for.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from vauban.directions.classifiers import check_options, float64_rows
from vauban.directions.estimators import check_labelled
from vauban.directions.linear import Span, row_scale, solve, span_of
from vauban.errors import InputError, VaubanWarning


@dataclass(frozen=True, eq=False)
class INLPResult:
    """What INLP found; `rank` directions, in extraction order.

    directions    (k, d) float32, orthonormal; row 0 is the first and strongest classifier
    accuracies    k held-out accuracies, each before its own direction was projected out
    tried         every classifier's held-out accuracy, those that failed included
    majority      held-out accuracy of always saying the larger class
    threshold     what an accuracy had to reach
    mean_cosines  |cosine| of each direction with the mean row: near 1 the common mean is removed
    scale         X was divided by this
    """

    directions: mx.array
    accuracies: tuple[float, ...]
    majority: float
    threshold: float
    tried: tuple[float, ...]
    mean_cosines: tuple[float, ...]
    scale: float
    kind: str
    C: float

    @property
    def rank(self) -> int:
        """Number of accepted classifiers, which is the rank of I - P."""
        return int(self.directions.shape[0])

    def projection(self, rank: int | None = None, alpha: float = 1.0) -> mx.array:
        """P_α = I - α V^T V, (d, d) float32, of the first `rank` directions (default all).

        α 1 erases, 2 reflects. Extraction order matters: I - P has equal singular values, so an
        SVD of it returns an arbitrary rotation of V and not its first directions.
        """
        k = self.rank if rank is None else rank
        if not 0 <= k <= self.rank:
            raise InputError(f"rank is {rank}; expected 0 to {self.rank}, the directions found")
        kept = self.directions[:k]
        return mx.eye(self.directions.shape[1]) - alpha * (kept.T @ kept)

    def summary(self) -> str:
        shown = " ".join(f"{a:.3f}" for a in self.accuracies[:8])
        return (
            f"INLP by {self.kind}: {self.rank} directions, held-out accuracies {shown or 'none'} "
            f"(majority {self.majority:.3f}, needed {self.threshold:.3f})"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": "inlp",
            "kind": self.kind,
            "C": self.C,
            "rank": self.rank,
            "accuracies": list(self.accuracies),
            "tried": list(self.tried),
            "majority": self.majority,
            "threshold": self.threshold,
            "mean_cosines": list(self.mean_cosines),
            "scale": self.scale,
        }


def fit_inlp(
    X: mx.array,
    y: mx.array,
    *,
    kind: Any = "logistic",
    C: float = 0.1,
    max_rank: int = 32,
    min_accuracy: float | str = "auto",
    dev_fraction: float = 0.2,
    patience: int = 2,
    scale: float | None = None,
    seed: int = 0,
) -> INLPResult:
    """INLP on X (n, d), y (n,) in {0, 1} (arXiv 2004.07667, algorithm 1).

    A stratified `dev_fraction` is held out (seeded); train accuracy cannot stop INLP, because
    n <= d rows stay separable for about n steps. "auto" asks for majority + 2 sd of an accuracy at
    chance, sd = 0.5 / sqrt(n_dev). A classifier below the threshold is set aside and not removed;
    `patience` of them in a row, or `max_rank` accepted ones, end the search. So rank(I - P) equals
    the number of accepted classifiers. The intercept is never projected. `scale` as for
    `fit_classifier`.

    Raises InputError for one class, too few rows for both parts, NaN, options out of range. Rows
    that stand in both parts are left out of the held-out part, with a warning.

    >>> import mlx.core as mx
    >>> y = mx.arange(40) % 2
    >>> X = mx.random.normal((40, 6), key=mx.random.key(0)) + 6 * y[:, None] * mx.eye(6)[0]
    >>> found = fit_inlp(X, y)
    >>> found.rank >= 1, abs(found.directions[0, 0].item()) > 0.8
    (True, True)
    """
    _, labels = check_labelled(X, y)
    rows = float64_rows(X)
    split = _split(labels, _distinct(rows), dev_fraction, seed)
    return _fit(
        rows, labels, split, kind, C, max_rank, min_accuracy, patience, scale
    )  # fmt: skip


def fit_inlp_batch(
    X: mx.array,
    y: mx.array,
    *,
    kind: Any = "logistic",
    C: float = 0.1,
    max_rank: int = 32,
    min_accuracy: float | str = "auto",
    dev_fraction: float = 0.2,
    patience: int = 2,
    scale: float | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[tuple[int, ...], INLPResult]:
    """`fit_inlp` at every (residual, position) of X (n, ..., d), over one common split.

    Returns {index over the middle axes: result}, so with the values of `collect_activations`
    found[residual, column]. The work of a problem lies in matrices of n x n, and a stack of them
    is no faster than one after the other; each is scaled by its own mean row norm.

    >>> import mlx.core as mx
    >>> X = mx.random.normal((30, 3, 2, 8), key=mx.random.key(0))
    >>> sorted(fit_inlp_batch(X, mx.arange(30) % 2))[:2]
    [(0, 0), (0, 1)]
    """
    if X.ndim < 3:
        raise InputError(f"X has shape {X.shape}; expected (n, ..., d) with an axis in between")
    flat = X.reshape(X.shape[0], -1)
    _, labels = check_labelled(flat, y)
    # A prompt is repeated only when it is the same at every layer and position: the embedding of
    # a template's token is the same in all prompts.
    split = _split(labels, _distinct(float64_rows(flat)), dev_fraction, seed)
    places = list(itertools.product(*(range(n) for n in X.shape[1:-1])))
    found = {}
    for done, place in enumerate(places, start=1):
        rows = float64_rows(X[(slice(None), *place)])
        found[place] = _fit(
            rows, labels, split, kind, C, max_rank, min_accuracy, patience, scale
        )  # fmt: skip
        if progress:
            progress("inlp", done, len(places))
    return found


def _distinct(rows: np.ndarray) -> np.ndarray:
    """(n,) the number of each row's value: equal rows share one."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in rows])


def _split(
    labels: np.ndarray, values: np.ndarray, dev_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(train, dev) row indices, stratified; what stands in both leaves dev."""
    if not 0.0 < dev_fraction < 1.0:
        raise InputError(f"dev_fraction is {dev_fraction}; expected a share between 0 and 1")
    rng = np.random.default_rng(seed)
    train, dev = [], []
    for name in (False, True):
        rows = rng.permutation(np.flatnonzero(labels == name))
        held = max(1, round(dev_fraction * rows.size))
        if rows.size - held < 2:
            raise InputError(
                f"{rows.size} rows of class {int(name)}: {held} held out and {rows.size - held} "
                "to train on; at least 3 rows of each class are needed"
            )
        dev.append(rows[:held])
        train.append(rows[held:])
    kept, tested = np.concatenate(train), np.concatenate(dev)
    again = np.isin(values[tested], values[kept])
    if again.any():
        warnings.warn(
            f"{int(again.sum())} of {tested.size} held-out rows stand in the training part as "
            "well; they are left out of the held-out part. Remove repeated prompts.",
            VaubanWarning,
            stacklevel=3,
        )
        tested = tested[~again]
        if len(set(labels[tested].tolist())) < 2:
            raise InputError(
                f"after removing repeated rows {tested.size} held-out rows of one class are left; "
                "more distinct prompts are needed"
            )
    return kept, tested


def _fit(
    rows: np.ndarray, labels: np.ndarray, split: tuple[np.ndarray, np.ndarray], kind: str,
    C: float, max_rank: int, min_accuracy: float | str, patience: int, scale: float | None,
) -> INLPResult:  # fmt: skip
    check_options(kind, C, scale)
    if max_rank < 1 or patience < 1:
        raise InputError(f"max_rank is {max_rank}, patience {patience}; expected at least 1")
    train, dev = split
    majority = float(max(labels[dev].mean(), 1.0 - labels[dev].mean()))
    if isinstance(min_accuracy, str):
        if min_accuracy != "auto":
            raise InputError(f"min_accuracy is {min_accuracy!r}; expected 'auto' or a number")
        threshold = majority + 2.0 * 0.5 / dev.size**0.5
    else:
        threshold = float(min_accuracy)
    factor = scale or row_scale(rows[train])
    span = span_of(rows[train] / factor)
    found, accepted, tried = _iterate(
        span, span.of(rows[dev] / factor), labels[train], labels[dev],
        kind, C, max_rank, threshold, patience,
    )  # fmt: skip
    directions = span.lift(found)
    mean = rows[train].mean(axis=0)
    cosines = np.abs(directions @ mean) / max(float(np.linalg.norm(mean)), 1e-300)
    return INLPResult(
        mx.array(directions.astype(np.float32)), tuple(accepted), majority, threshold,
        tuple(tried), tuple(float(c) for c in cosines), factor, kind, C,
    )  # fmt: skip


def _iterate(
    span: Span, held: np.ndarray, y: np.ndarray, y_held: np.ndarray, kind: str,
    C: float, max_rank: int, threshold: float, patience: int,
) -> tuple[np.ndarray, list[float], list[float]]:  # fmt: skip
    """Accepted directions (k, r) in span coordinates, their accuracies, and all accuracies."""
    x = span.coordinates.copy()
    size = float(np.linalg.norm(x))
    # Directions set aside stay here, so that the next classifier looks elsewhere, but not in V.
    removed = np.zeros((0, x.shape[1]))
    kept: list[np.ndarray] = []
    accepted: list[float] = []
    tried: list[float] = []
    failures = 0
    while len(kept) < max_rank and failures < patience and len(removed) < x.shape[1]:
        w, bias = solve(kind, x, y, C, span.d)
        for _ in range(2):
            # Orthogonal already up to rounding, which two passes take off.
            w = w - removed.T @ (removed @ w)
        norm = float(np.linalg.norm(w))
        if norm <= 1e-9 or np.linalg.norm(x) <= 1e-9 * size:
            break
        accuracy = float((((held @ w) + bias > 0) == y_held).mean())
        tried.append(accuracy)
        v = w / norm
        if accuracy >= threshold:
            kept.append(v)
            accepted.append(accuracy)
            failures = 0
        else:
            failures += 1
        removed = np.vstack([removed, v])
        x -= np.outer(x @ v, v)
        held = held - np.outer(held @ v, v)
    return np.array(kept).reshape(len(kept), span.coordinates.shape[1]), accepted, tried
