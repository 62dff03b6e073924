"""Classifier weights as directions: logistic regression, linear SVM, linear discriminant.

Checks and scales X, solves in the span of its rows; computes no projection.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from vauban._backend import one_blas_thread
from vauban.directions.estimators import Direction, check_labelled
from vauban.directions.linear import KINDS, row_scale, solve, span_of
from vauban.errors import InputError


def float64_rows(X: mx.array) -> np.ndarray:
    """X (n, ..., d) in float64; InputError when it holds NaN or inf."""
    rows = np.array(X.astype(mx.float32), dtype=np.float64)
    if not np.isfinite(rows).all():
        raise InputError("X holds NaN or inf; expected finite activations")
    return rows


def check_options(kind: str, C: float, scale: float | None) -> None:
    """The arguments that classifiers share."""
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}; expected one of {KINDS}")
    if not C > 0 or not np.isfinite(C):
        raise InputError(f"C is {C}; expected a positive number")
    if scale is not None and (not scale > 0 or not np.isfinite(scale)):
        raise InputError(f"scale is {scale}; expected a positive number or None")


def fit_classifier(
    X: mx.array, y: mx.array, *, kind: Any = "logistic", C: float = 0.1, scale: float | None = None
) -> Direction:
    """Weights of a linear classifier of X (n, d) by y (n,) in {0, 1}, as a raw direction (d,).

    `kind`: "logistic" (L2-penalised, free bias), "svm" (squared hinge) or "lda" (shrunk
    within-class covariance; C is not used). X is divided by `scale` while fitting, so that one C
    fits the small norms of early layers and the large ones of late layers; None is the mean row
    norm over sqrt(d), 1.0 leaves X alone. The weights returned are in the units of X: 1 where
    w.x + bias > 0.

    Raises InputError for one class, wrong shapes or labels, NaN, C <= 0, an unknown kind.

    >>> import mlx.core as mx
    >>> X = mx.array([[0.0, 1], [1, 1], [4, 1], [5, 1]])
    >>> fitted = fit_classifier(X, mx.array([0, 0, 1, 1]), kind="svm")
    >>> (X @ fitted.vector + fitted.bias > 0).tolist()
    [False, False, True, True]
    """
    check_options(kind, C, scale)
    _, labels = check_labelled(X, y)
    rows = float64_rows(X)
    factor = row_scale(rows) if scale is None else scale
    span = span_of(rows / factor)
    with one_blas_thread():
        w, bias = solve(kind, span.coordinates, labels, C, span.d)
    vector = (span.lift(w) / factor).astype(np.float32)
    if not np.linalg.norm(vector) > 0:
        raise InputError(f"the {kind} classifier found no direction: the classes are equal")
    return Direction(mx.array(vector), bias, kind)
