"""How directions and subspaces lie to each other: cosines, principal angles, effective rank.

Knows vectors only, no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vauban.errors import InputError
from vauban.linalg import numpy_basis, unit


@dataclass(frozen=True)
class Geometry:
    """A set of directions: all cosines, and which pairs are independent.

    >>> import mlx.core as mx
    >>> found = analyze_geometry({"a": mx.array([1.0, 0.0]), "b": mx.array([0.6, 0.8])})
    >>> round(found.cosines[0][1], 6), found.independent
    (0.6, ())
    """

    names: tuple[str, ...]
    cosines: tuple[tuple[float, ...], ...]
    independent: tuple[tuple[str, str], ...]
    """The pairs whose |cosine| is below the threshold."""
    threshold: float
    rank: float
    """The number of dimensions the set effectively spans: exp of the entropy of its squared
    singular values; n for n orthogonal directions, 1 for n equal ones."""

    def summary(self) -> str:
        width = max(map(len, self.names))
        lines = [f"{len(self.names)} directions spanning about {self.rank:.2f} dimensions"]
        for name, row in zip(self.names, self.cosines, strict=True):
            lines.append(f"{name:<{width}}  " + " ".join(f"{value:+.2f}" for value in row))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "cosines": [list(row) for row in self.cosines],
            "independent": [list(pair) for pair in self.independent],
            "threshold": self.threshold,
            "rank": self.rank,
        }


def analyze_geometry(
    directions: Mapping[str, Any], independence_threshold: float = 0.1
) -> Geometry:
    """All pairwise cosines of named directions.

    Args:
        directions: {name: result object or array (d,)}, at least two.
        independence_threshold: pairs with a smaller |cosine| are called independent.

    Raises:
        InputError: fewer than two directions, or one that cannot be compared.

    >>> import mlx.core as mx
    >>> found = analyze_geometry({"a": mx.array([1.0, 0.0]), "b": mx.array([0.0, 2.0])})
    >>> found.independent, round(found.rank, 3)
    ((('a', 'b'),), 2.0)
    """
    if len(directions) < 2:
        raise InputError(f"{len(directions)} direction given, expected at least two to compare.")
    names = tuple(directions)
    rows = [unit(direction, name) for name, direction in directions.items()]
    sizes = {name: row.size for name, row in zip(names, rows, strict=True)}
    if len(set(sizes.values())) > 1:
        raise InputError(f"the directions have different lengths: {sizes}.")
    stacked = np.stack(rows)
    cosines = np.clip(stacked @ stacked.T, -1.0, 1.0)
    share = np.linalg.svd(stacked, compute_uv=False) ** 2
    share = share[share > 0] / share.sum()
    return Geometry(
        names,
        tuple(tuple(float(value) for value in row) for row in cosines),
        tuple(
            (names[i], names[j])
            for i in range(len(names))
            for j in range(i + 1, len(names))
            if abs(cosines[i, j]) < independence_threshold
        ),
        independence_threshold,
        float(np.exp(-(share * np.log(share)).sum())),
    )


def principal_angles(a: Any, b: Any) -> tuple[float, ...]:
    """Angles in degrees between two subspaces, smallest first (Björck and Golub 1973).

    Each is an array (d,) or (k, d), not necessarily orthonormal, or a result that holds one.
    There are min(k_a, k_b) of them; equal subspaces give zeros. Small angles come from sines, so
    that they are exact to about 1e-6 degrees and not to the root of the rounding.

    Raises InputError for different widths, dependent or non-finite rows.

    >>> import mlx.core as mx
    >>> [round(v, 4) for v in principal_angles(mx.eye(3)[:2], mx.array([[1.0, 1.0, 0.0]]))]
    [0.0]
    """
    p, q = numpy_basis(a, "the first subspace"), numpy_basis(b, "the second subspace")
    if p.shape[1] != q.shape[1]:
        raise InputError(
            f"the subspaces have {p.shape[1]} and {q.shape[1]} components; expected one width"
        )
    if len(p) < len(q):
        p, q = q, p
    inner = q @ p.T
    u, cosines, _ = np.linalg.svd(inner)
    sines = np.linalg.norm(u.T @ (q - inner @ p), axis=1)
    angles = np.where(
        cosines**2 < 0.5, np.arccos(np.clip(cosines, -1, 1)), np.arcsin(np.clip(sines, 0, 1))
    )
    return tuple(float(v) for v in np.sort(np.degrees(angles)))
