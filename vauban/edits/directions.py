"""What is done to a direction before it is cut: biprojection, sparsification.

Arrays only.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from vauban.errors import InputError
from vauban.linalg import as_basis, as_direction


def sparsify_direction(direction: mx.array, sparsity: float) -> mx.array:
    """Zero the share `sparsity` of the components smallest in size; renormalise what is left.

    0 keeps all, 0.9 the largest tenth (at least one component). Returns (d,) float32 of norm 1.

    Raises InputError for a share outside [0, 1), and a direction that is zero or not finite.

    >>> import mlx.core as mx
    >>> [round(v, 3) for v in sparsify_direction(mx.array([3.0, 0.1, -4.0, 0.2]), 0.5).tolist()]
    [0.6, 0.0, -0.8, 0.0]
    """
    if not 0.0 <= sparsity < 1.0:
        raise InputError(f"sparsity is {sparsity}; expected 0 <= s < 1 (0.9 keeps the top tenth)")
    values = np.array(as_direction(direction, "sparsify_direction"), dtype=np.float64)
    zeroed = min(round(sparsity * values.size), values.size - 1)
    values[np.argsort(np.abs(values), kind="stable")[:zeroed]] = 0.0
    return mx.array((values / np.linalg.norm(values)).astype(np.float32))


def biproject(refusal: Any, harmless: Any) -> mx.array:
    """r - (r.b) b, unit, in two passes: refusal made orthogonal to the harmless direction b.

    Either may be several rows (k, d): then the refusal subspace is made orthogonal to the harmless
    one and comes back as an orthonormal basis (k, d). Biprojected abliteration (grimjim, 2025).
    Raises InputError when a direction of the one lies in the other (parallel, for single ones), as
    it does when `harmless` came from `measure` with its sets swapped.
    """
    r = np.array(as_basis(refusal, "refusal_direction"), dtype=np.float64)
    b = np.array(as_basis(harmless, "harmless_direction", r.shape[1]), dtype=np.float64)
    inner = r @ b.T
    cosine = float(inner.item() if inner.size == 1 else np.linalg.norm(inner, 2))
    if abs(cosine) > 0.999:
        raise InputError(
            f"the harmless direction is the refusal direction (cosine {cosine:+.4f}): nothing "
            "would be left to cut. measure() with the sets swapped only flips the sign; pass the "
            "harmless MEAN of the layer instead: result.harmless_mean(result.layer_index)"
        )
    for _ in range(2):
        r = r - (r @ b.T) @ b
    q, triangle = np.linalg.qr(r.T)
    rows = mx.array((q * np.sign(np.diag(triangle))).T.astype(np.float32))
    return rows[0] if len(r) == 1 else rows
