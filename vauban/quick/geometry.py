"""How directions lie to each other: cosines and angles. Knows vectors only, no model."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from vauban.errors import InputError


@dataclass(frozen=True)
class Comparison:
    """Two directions: their cosine and the angle between them in degrees."""

    cosine: float
    degrees: float

    def summary(self) -> str:
        return f"cosine {self.cosine:.4f}, angle {self.degrees:.1f}°"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Geometry:
    """A set of directions: all cosines, and which pairs are independent."""

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


def compare(dir_a: Any, dir_b: Any) -> Comparison:
    """Cosine and angle of two directions, each a result object or an array (d,).

    Raises:
        InputError: a zero or non-finite direction, or two different lengths.

    >>> import mlx.core as mx
    >>> compare(mx.array([1.0, 0.0]), mx.array([1.0, 1.0])).summary()
    'cosine 0.7071, angle 45.0°'
    """
    a, b = unit(dir_a, "the first direction"), unit(dir_b, "the second direction")
    if a.shape != b.shape:
        raise InputError(
            f"the directions have {a.size} and {b.size} components; expected the same model width"
        )
    cosine = float(np.clip(a @ b, -1.0, 1.0))
    return Comparison(cosine, math.degrees(math.acos(cosine)))


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


def vector(direction: Any) -> mx.array:
    """The (d,) array of a result object, or the array itself.

    Raises:
        InputError: neither, or an array that is no vector.
    """
    found = getattr(direction, "direction", direction)
    found = found if isinstance(found, mx.array) else mx.array(np.asarray(found))
    if found.ndim != 1:
        raise InputError(
            f"a direction of shape {tuple(found.shape)} was given; expected one vector (d,)."
        )
    return found


def unit(direction: Any, name: str) -> np.ndarray:
    """The direction as a float64 unit vector on the numpy side."""
    values = np.array(vector(direction).astype(mx.float32), dtype=np.float64)
    norm = float(np.linalg.norm(values))
    if not math.isfinite(norm) or norm == 0:
        raise InputError(f"{name} has norm {norm}; expected a finite direction that is not zero.")
    return values / norm
