"""The mathematics of a cut: W <- W - α U^T (U W), norm modes, and what is left of a direction.

Arrays in, arrays out; computed in float32. W is (..., out, in), U (k, out) row-orthonormal; a
leading axis holds experts, each of which is cut on its own.
"""

from __future__ import annotations

from typing import Literal

import mlx.core as mx

from vauban._common import RELATIVE_NOISE
from vauban.errors import InputError
from vauban.linalg import as_basis

NormMode = Literal["column", "row", "frobenius"] | None
NORM_MODES = ("column", "row", "frobenius")


def remove(weight: mx.array, basis: mx.array, alpha: float = 1.0) -> mx.array:
    """W - α U^T (U W), float32. At α = 1 a second pass removes what rounding left."""
    w = weight.astype(mx.float32)
    w = w - alpha * (basis.T @ (basis @ w))
    if alpha == 1.0:
        w = w - basis.T @ (basis @ w)
    return w


def remove_from_bias(bias: mx.array, basis: mx.array, alpha: float = 1.0) -> mx.array:
    """b - α U^T (U b) for b (..., out), float32."""
    b = bias.astype(mx.float32)
    return b - alpha * (b @ basis.T) @ basis


def restore_norms(cut: mx.array, original: mx.array, mode: NormMode) -> mx.array:
    """Rescale a cut matrix to the original's norms.

    "column" (each input's column of W) and "frobenius" keep U W = 0 exactly, because they scale
    columns; "row" (the tutorial's) scales the components of the output and puts the direction
    back in part.
    """
    if mode is None:
        return cut
    if mode not in NORM_MODES:
        raise InputError(f"norm_preserve is {mode!r}; expected None or one of {NORM_MODES}")
    axes: dict[str, list[int]] = {"column": [-2], "row": [-1], "frobenius": [-2, -1]}
    axis = axes[mode]
    before = mx.sqrt((original.astype(mx.float32) ** 2).sum(axis=axis, keepdims=True))
    after = mx.sqrt((cut**2).sum(axis=axis, keepdims=True))
    # A column that lay in the removed span has nothing left to scale.
    return cut * mx.where(after > RELATIVE_NOISE * before, before / mx.maximum(after, 1e-30), 1.0)


def cut_matrix(
    weight: mx.array, basis: mx.array, alpha: float = 1.0, mode: NormMode = None
) -> mx.array:
    """The cut matrix in float32: removal, then the norm mode."""
    return restore_norms(remove(weight, basis, alpha), weight, mode)


def share_left(after: mx.array, before: mx.array, basis: mx.array) -> float:
    """‖U W'‖ / ‖U W‖ in float32: 0 after an exact cut, 1 when nothing happened.

    NaN where a matrix holds NaN, infinite where a direction appears that was not in it before.
    """
    return share(
        float(mx.linalg.norm(basis @ after.astype(mx.float32))),
        float(mx.linalg.norm(basis @ before.astype(mx.float32))),
    )


def share(part: float, whole: float) -> float:
    """part / whole, NaN from NaN; 0 of nothing is 0, anything else of nothing is infinite."""
    if whole == 0.0:
        return 0.0 if part == 0.0 else float("inf")
    return part / whole


def through_gain(basis: mx.array, gain: mx.array | None) -> mx.array:
    """The basis to remove from a writer so that D is gone behind a post-norm with gain g.

    d.(g ∘ y / rms) = (g ∘ d).y / rms, and the rms is a scalar, so u = normalize(g ∘ d) is exact
    at α = 1 (METHODS: "the plain cut is NOT exact").
    """
    if gain is None:
        return basis
    return as_basis(basis * gain.astype(mx.float32), "cut behind a post-norm")
