"""Unit vectors and orthonormal bases, checked once on entry. Knows arrays only."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from vauban.errors import InputError


def orthonormal_rows(directions: mx.array, name: str, size: int | None = None) -> mx.array:
    """A row-orthonormal float32 basis (k, d) of the span of `directions`, (d,) or (k, d).

    QR in float64, so that a non-orthogonal set is removed jointly and in no order. Raises
    InputError for a zero, non-finite, dependent or wrongly sized direction.
    """
    rows = np.atleast_2d(np.array(directions.astype(mx.float32), dtype=np.float64))
    if rows.ndim != 2 or rows.shape[0] > rows.shape[1]:
        raise InputError(
            f"{name}: direction has shape {tuple(directions.shape)}; expected (d,) or (k, d)"
        )
    if size is not None and rows.shape[1] != size:
        raise InputError(
            f"{name}: direction has {rows.shape[1]} components; the residual stream has {size}"
        )
    if not np.isfinite(rows).all():
        raise InputError(f"{name}: direction holds NaN or inf")
    norms = np.linalg.norm(rows, axis=1)
    if (norms < 1e-12).any():
        raise InputError(f"{name}: direction {int(norms.argmin())} is zero; it names no direction")
    q, r = np.linalg.qr((rows / norms[:, None]).T)
    pivots = np.diag(r)
    if (np.abs(pivots) < 1e-6).any():
        raise InputError(f"{name}: the {rows.shape[0]} directions are linearly dependent")
    # A QR may flip signs; keep each vector pointing the way it was given.
    return mx.array((q * np.sign(pivots)).T.astype(np.float32))


def project_out(h: mx.array, basis: mx.array, alpha: float) -> mx.array:
    """h - α Dᵀ(D h) for D (k, d), computed in float32 and returned in h's dtype."""
    x = h.astype(mx.float32)
    return (x - alpha * (x @ basis.T) @ basis).astype(h.dtype)
