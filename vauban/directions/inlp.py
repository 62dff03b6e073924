"""Iterative null-space projection (Ravfogel et al. 2020): classifier after classifier, projected.

The search runs in the span of the training rows. Knows arrays only; never forms a d x d matrix
unless one is asked for.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from vauban._backend import one_blas_thread
from vauban._common import Progress
from vauban.directions.classifiers import (
    check_options,
    float64_rows,
    row_scale,
    solve,
    span_of,
)
from vauban.directions.estimators import check_labelled
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

    >>> import mlx.core as mx
    >>> y = mx.arange(40) % 2
    >>> X = mx.random.normal((40, 6), key=mx.random.key(0)) + 6 * y[:, None] * mx.eye(6)[0]
    >>> found = fit_inlp(X, y)
    >>> erased = X @ found.projection()
    >>> float(mx.abs(erased @ found.directions.T).max()) < 1e-4
    True
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
    split = _split(labels, _distinct(np.array(X.astype(mx.float32))), dev_fraction, seed)
    return _fit(
        X[:, None], labels, split, kind, C, max_rank, min_accuracy, patience, scale, None
    )[0]  # fmt: skip


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
    progress: Progress | None = None,
) -> dict[tuple[int, ...], INLPResult]:
    """`fit_inlp` at every (residual, position) of X (n, ..., d), over one common split.

    Returns {index over the middle axes: result}, so with the values of `collect_activations`
    found[residual, column]. Each problem is scaled by its own mean row norm.

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
    split = _split(labels, _distinct(np.array(flat.astype(mx.float32))), dev_fraction, seed)
    places = itertools.product(*(range(n) for n in X.shape[1:-1]))
    found = _fit(
        X.reshape(X.shape[0], -1, X.shape[-1]), labels, split,
        kind, C, max_rank, min_accuracy, patience, scale, progress,
    )  # fmt: skip
    return dict(zip(places, found, strict=True))


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
    X: mx.array, labels: np.ndarray, split: tuple[np.ndarray, np.ndarray], kind: str, C: float,
    max_rank: int, min_accuracy: float | str, patience: int, scale: float | None,
    progress: Progress | None,
) -> list[INLPResult]:  # fmt: skip
    """One result for each problem of X (n, problems, d)."""
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
    rule = _Rule(kind, C, max_rank, threshold, patience)
    results: list[INLPResult] = []
    for problem in range(X.shape[1]):
        rows = float64_rows(X[:, problem])
        factor = row_scale(rows[train]) if scale is None else scale
        with one_blas_thread():
            search = _search(rows / factor, labels, train, dev, rule)
        mean = rows[train].mean(axis=0)
        cosines = np.abs(search.directions @ mean) / max(float(np.linalg.norm(mean)), 1e-300)
        results.append(
            INLPResult(
                mx.array(search.directions.astype(np.float32)), tuple(search.accuracies), majority,
                threshold, tuple(search.tried), tuple(cosines.tolist()), factor, kind, C,
            )
        )  # fmt: skip
        if progress:
            progress("inlp", problem + 1, X.shape[1])
    return results


@dataclass(frozen=True)
class _Rule:
    """Which classifiers are fitted, which are accepted, and when a search ends."""

    kind: str
    C: float
    max_rank: int
    threshold: float
    patience: int


@dataclass(frozen=True, eq=False)
class _Search:
    """What a search has tried; `directions` (k, d) and their accuracies are those accepted."""

    directions: np.ndarray
    accuracies: list[float]
    tried: list[float]


def _search(
    rows: np.ndarray, labels: np.ndarray, train: np.ndarray, dev: np.ndarray, rule: _Rule
) -> _Search:
    """Classifier after classifier on the training rows, each one's direction taken off them.

    Ends with enough accepted, too many failures in a row, or nothing left of the r dimensions.
    """
    span = span_of(rows[train])
    x, held_out = span.coordinates, span.of(rows[dev])
    r = x.shape[1]
    nothing = 1e-9 * np.linalg.norm(x)
    # A classifier that failed stays removed, so that the next one looks elsewhere, but not in V.
    removed = np.zeros((0, r))
    accepted: list[int] = []
    tried: list[float] = []
    while len(accepted) < rule.max_rank and len(tried) < r:
        recent = tried[accepted[-1] + 1 :] if accepted else tried
        if len(recent) >= rule.patience or np.linalg.norm(x) <= nothing:
            break
        w, bias = solve(rule.kind, x, labels[train], rule.C, span.d)
        # Orthogonal already up to rounding, which two passes take off.
        for _ in range(2):
            w = w - (w @ removed.T) @ removed
        norm = float(np.linalg.norm(w))
        if norm <= 1e-9:
            break
        accuracy = float(((held_out @ w + bias > 0) == labels[dev]).mean())
        if accuracy >= rule.threshold:
            accepted.append(len(tried))
        tried.append(accuracy)
        v = w / norm
        removed = np.vstack([removed, v])
        # x <- x (I - v vᵀ), row by row, and the same off the held-out rows.
        x = x - np.outer(x @ v, v)
        held_out = held_out - np.outer(held_out @ v, v)
    return _Search(span.lift(removed[accepted]), [tried[i] for i in accepted], tried)
