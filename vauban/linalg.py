"""A direction read from whatever holds one, checked on entry; orthonormal bases and projections.

Knows arrays; knows no model.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from vauban._common import RELATIVE_NOISE
from vauban.errors import InputError

# Where a result keeps its direction or its basis; the first one that it has is read.
_HOLDERS = ("basis", "direction", "directions", "vector")


def project_out(h: mx.array, basis: mx.array, alpha: float = 1.0) -> mx.array:
    """h - α Dᵀ(D h) for D (k, d), computed in float32 and returned in h's dtype."""
    x = h.astype(mx.float32)
    return (x - alpha * (x @ basis.T) @ basis).astype(h.dtype)


def as_basis(value: Any, name: str, size: int | None = None) -> mx.array:
    """A row-orthonormal float32 basis (k, d) of the directions that `value` holds.

    `value` is an array of mlx or NumPy, (d,) or (k, d), nested lists, or a result: `basis`
    (`SubspaceResult`), `direction` (`DirectionResult`), `directions` (`INLPResult`) or `vector`
    (`Direction`) is read. Several rows are orthonormalised jointly, in no order, by a QR in
    float64. `name` opens the error messages; `size` is the width that the directions must have.

    Raises InputError for an eraser, which is no orthogonal projection, and for zero, non-finite,
    dependent or wrongly sized directions.

    >>> basis = as_basis([[3.0, 0.0], [1.0, 1.0]], "example")
    >>> bool(mx.allclose(basis, mx.eye(2)))
    True
    """
    return mx.array(numpy_basis(value, name, size).astype(np.float32))


def as_direction(value: Any, name: str, size: int | None = None) -> mx.array:
    """One unit direction (d,), read as by `as_basis`; InputError for more than one."""
    return mx.array(unit(value, name, size).astype(np.float32))


def as_vector(value: Any, name: str, size: int | None = None) -> mx.array:
    """One vector (d,) of any finite length, read as by `as_basis` but not normalised; float32."""
    return mx.array(_one(value, name, size)[0].astype(np.float32))


def numpy_basis(value: Any, name: str, size: int | None = None) -> np.ndarray:
    """As `as_basis`, in float64: what angles between subspaces need."""
    rows = as_rows(value, name, size)
    if rows.shape[0] > rows.shape[1]:
        raise InputError(f"{name}: direction has shape {rows.shape}; expected (d,) or (k, d)")
    norms = np.linalg.norm(rows, axis=1)
    if (norms < 1e-12).any():
        raise InputError(f"{name}: direction {int(norms.argmin())} is zero; it names no direction")
    q, r = np.linalg.qr((rows / norms[:, None]).T)
    pivots = np.diag(r)
    if (np.abs(pivots) < RELATIVE_NOISE).any():
        raise InputError(f"{name}: the {rows.shape[0]} directions are linearly dependent")
    # A QR may flip signs; each vector keeps pointing the way it was given.
    return (q * np.sign(pivots)).T


def unit(value: Any, name: str, size: int | None = None) -> np.ndarray:
    """As `as_direction`, in float64: what the angle between two directions needs."""
    return numpy_basis(_one(value, name, size), name)[0]


def as_array(value: Any, name: str) -> mx.array:
    """An mlx array from one, or from NumPy's or nested lists (in float32); else InputError."""
    return value if isinstance(value, mx.array) else mx.array(_numpy(value, name, np.float32))


def _numpy(value: Any, name: str, dtype: Any) -> np.ndarray:
    try:
        if value is None:
            raise TypeError("nothing is given")
        return np.asarray(value, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} is {value!r:.80}; expected an array or a list of numbers"
        ) from error


def _one(value: Any, name: str, size: int | None) -> np.ndarray:
    """The row (1, d) of a value that holds one direction."""
    rows = as_rows(value, name, size)
    if rows.shape[0] != 1:
        raise InputError(f"{name}: {rows.shape[0]} directions are given; expected one, (d,)")
    return rows


def as_rows(value: Any, name: str, size: int | None = None) -> np.ndarray:
    """The finite rows (k, d), k >= 1, that `value` holds, as they are given; float64."""
    if hasattr(value, "left") and hasattr(value, "right"):
        raise InputError(
            f"{name}: a {type(value).__name__} is an oblique map, not a direction; use it at run "
            "time (Erase), or take its mean difference"
        )
    holders = (getattr(value, attribute, None) for attribute in _HOLDERS)
    array = next((held for held in holders if held is not None), value)
    array = array.astype(mx.float32) if isinstance(array, mx.array) else array
    rows = np.atleast_2d(_numpy(array, f"{name}: direction", np.float64))
    if rows.size == 0:
        raise InputError(
            f"{name}: direction has shape {rows.shape}; an empty basis (fit_inlp finds none on "
            "noise) names no direction"
        )
    if rows.ndim != 2:
        raise InputError(f"{name}: direction has shape {rows.shape}; expected (d,) or (k, d)")
    if size is not None and rows.shape[1] != size:
        raise InputError(
            f"{name}: direction has {rows.shape[1]} components; the residual stream has {size}"
        )
    if not np.isfinite(rows).all():
        raise InputError(f"{name}: direction holds NaN or inf")
    return rows
