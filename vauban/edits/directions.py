"""What is done to a direction before it is cut: unit length, biprojection, sparsification.

Arrays only.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from vauban.errors import InputError
from vauban.interventions.vectors import orthonormal_rows


def as_basis(direction: Any, name: str, size: int | None = None) -> mx.array:
    """(k, d) row-orthonormal from a direction, a basis or a `DirectionResult`."""
    value = getattr(direction, "direction", direction)
    value = getattr(direction, "basis", value)
    if not isinstance(value, mx.array):
        value = mx.array(np.asarray(value, dtype=np.float32))
    return orthonormal_rows(value, name, size)


def sparsify_direction(direction: mx.array, sparsity: float) -> mx.array:
    """Zero the share `sparsity` of the components smallest in size; renormalise what is left.

    0 keeps all, 0.9 the largest tenth (at least one component). Returns (d,) float32 of norm 1.

    >>> import mlx.core as mx
    >>> sparsify_direction(mx.array([3.0, 0.1, -4.0, 0.2]), 0.5).tolist()
    [0.6000000238418579, 0.0, -0.800000011920929, 0.0]
    """
    if not 0.0 <= sparsity < 1.0:
        raise InputError(f"sparsity is {sparsity}; expected 0 <= s < 1 (0.9 keeps the top tenth)")
    values = np.array(as_basis(direction, "sparsify_direction")[0], dtype=np.float64)
    zeroed = min(round(sparsity * values.size), values.size - 1)
    values[np.argsort(np.abs(values), kind="stable")[:zeroed]] = 0.0
    return mx.array((values / np.linalg.norm(values)).astype(np.float32))


def biproject(refusal: mx.array, harmless: mx.array) -> mx.array:
    """r - (r.b) b, unit, in two passes: refusal made orthogonal to the harmless direction b.

    Biprojected abliteration (grimjim, 2025). Raises InputError when the two are (anti)parallel,
    as they are when `harmless` came from `measure` with its sets swapped.
    """
    r = np.array(as_basis(refusal, "refusal_direction")[0], dtype=np.float64)
    b = np.array(as_basis(harmless, "harmless_direction", r.size)[0], dtype=np.float64)
    cosine = float(r @ b)
    if abs(cosine) > 0.999:
        raise InputError(
            f"the harmless direction is the refusal direction (cosine {cosine:+.4f}): nothing "
            "would be left to cut. measure() with the sets swapped only flips the sign; pass the "
            "harmless MEAN of the layer instead: result.harmless_mean(result.layer_index)"
        )
    for _ in range(2):
        r = r - (r @ b) * b
    return mx.array((r / np.linalg.norm(r)).astype(np.float32))
