"""Two directions side by side; the geometry of a set comes from `vauban.directions`."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vauban.directions.geometry import Geometry, analyze_geometry
from vauban.errors import InputError
from vauban.linalg import unit

__all__ = ["Comparison", "Geometry", "analyze_geometry", "compare"]


@dataclass(frozen=True)
class Comparison:
    """Two directions: their cosine and the angle between them in degrees."""

    cosine: float
    degrees: float

    def summary(self) -> str:
        return f"cosine {self.cosine:.4f}, angle {self.degrees:.1f}°"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
