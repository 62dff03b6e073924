"""Principal components of contrastive activations, paired and centred. Knows arrays only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from vauban._arrays import floats
from vauban._common import RELATIVE_NOISE
from vauban.directions.classifiers import float64_rows
from vauban.directions.estimators import check_labelled
from vauban.errors import InputError


@dataclass(frozen=True, eq=False)
class Subspace:
    """`basis` (k, d) orthonormal, strongest first, each row pointing from class 0 to class 1.

    `singular_values` (k,) of the decomposed matrix; `explained_variance` (k,) shares of the sum
    of all its squared singular values.
    """

    basis: mx.array
    singular_values: mx.array
    explained_variance: mx.array
    method: str

    def summary(self) -> str:
        shares = " ".join(f"{v:.2f}" for v in floats(self.explained_variance))
        return f"{self.method} subspace, k = {self.basis.shape[0]}, explained {shares}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "k": int(self.basis.shape[0]),
            "singular_values": floats(self.singular_values),
            "explained_variance": floats(self.explained_variance),
        }


def fit_pca(
    X: mx.array, y: mx.array, k: int, *, kind: Literal["paired", "centered"] = "paired"
) -> Subspace:
    """The first k principal components of X (n, d), y (n,) in {0, 1}.

    "paired": the i-th row of class 1 is paired with the i-th of class 0, and the differences are
    decomposed without centring, which equals centring every pair and taking all rows (RepE,
    Zou et al. 2023, arXiv 2310.01405). Centring the differences would take the mean difference
    itself away. "centered": all rows about the midpoint of the class means.

    Raises InputError for unequal classes with "paired", or k beyond the rank.

    >>> import mlx.core as mx
    >>> X = mx.array([[0.0, 0], [1, 1], [4, 0], [5, 1]])
    >>> fit_pca(X, mx.array([0, 0, 1, 1]), 1).basis.tolist()
    [[1.0, 0.0]]
    """
    _, labels = check_labelled(X, y)
    rows = float64_rows(X)
    high, low = rows[labels], rows[~labels]
    if kind == "paired":
        if len(high) != len(low):
            raise InputError(
                f"{len(high)} rows of class 1 and {len(low)} of class 0; pairs need equal numbers"
            )
        matrix = high - low
    elif kind == "centered":
        matrix = rows - (high.mean(axis=0) + low.mean(axis=0)) / 2
    else:
        raise InputError(f"kind is {kind!r}; expected 'paired' or 'centered'")
    _, s, vt = np.linalg.svd(matrix, full_matrices=False)
    rank = int((s > RELATIVE_NOISE * max(float(np.abs(rows).max()), 1e-300)).sum())
    if not 1 <= k <= rank:
        raise InputError(f"k is {k}; expected 1 to {rank}, the rank of the {len(matrix)} rows")
    basis = vt[:k]
    # A singular vector has no sign of its own: harmful is to project higher.
    sign = np.sign(basis @ (high.mean(axis=0) - low.mean(axis=0)))
    basis = basis * np.where(sign == 0, 1.0, sign)[:, None]
    return Subspace(
        mx.array(basis.astype(np.float32)),
        mx.array(s[:k].astype(np.float32)),
        mx.array((s[:k] ** 2 / (s**2).sum()).astype(np.float32)),
        f"pca_{kind}",
    )
