"""Iterative null-space projection (Ravfogel et al. 2020): classifier after classifier, projected.

Checks, splits, scales and reports; `extraction` does the search, in the span of the training rows,
on all layers and positions at once. Knows arrays only; never forms a d x d matrix unless one is
asked for.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from vauban._arrays import floats
from vauban._common import Progress
from vauban.directions.classifiers import check_options, float64_rows
from vauban.directions.estimators import check_labelled
from vauban.directions.extraction import Rule, search_stack
from vauban.directions.linear import FLOAT, row_scale, span_of
from vauban.errors import InputError, VaubanWarning

# A stack of problems may take this much; beyond it they are solved in several.
STACK_BYTES = 2**29


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
    found[residual, column]. Each problem is scaled by its own mean row norm. All of them are
    solved as one stack, or as few as fit into half a GiB.

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
    """One result for each problem of X (n, problems, d), as many at once as fit."""
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
    rule = Rule(max_rank, threshold, patience)
    results: list[INLPResult] = []
    _, problems, d = X.shape
    stack = max(1, STACK_BYTES // _problem_bytes(train.size, dev.size, d))
    for first in range(0, problems, stack):

        def tell(done: int, first: int = first) -> None:
            if progress:
                progress("inlp", first + done, problems)

        values = float64_rows(X[:, first : first + stack])
        with mx.stream(mx.cpu):
            rows = mx.array(values.swapaxes(0, 1), dtype=FLOAT)
            fitted, held = rows[:, mx.array(train)], rows[:, mx.array(dev)]
            scales = row_scale(fitted) if scale is None else mx.full((len(rows),), scale, FLOAT)
            span = span_of(fitted / scales[:, None, None])
            searches = search_stack(
                span, span.of(held / scales[:, None, None]), labels[train], labels[dev],
                kind, C, rule, tell,
            )  # fmt: skip
            for k, (search, factor, mean) in enumerate(
                zip(searches, floats(scales), fitted.mean(axis=1), strict=True)
            ):
                V = span.lift(search.directions, k)
                cosines = mx.abs(V @ mean) / mx.maximum(mx.linalg.norm(mean), 1e-300)
                found = INLPResult(
                    V.astype(mx.float32), tuple(search.accepted), majority, threshold,
                    tuple(search.tried), tuple(floats(cosines)), factor, kind, C,
                )  # fmt: skip
                mx.eval(found.directions)
                results.append(found)
    return results


def _problem_bytes(train: int, dev: int, d: int) -> int:
    """What one problem holds at its peak, in float64: rows, basis and the squares of a step."""
    r = min(train, d)
    return 8 * (4 * (train + dev) * (d + r) + 6 * r * r)
