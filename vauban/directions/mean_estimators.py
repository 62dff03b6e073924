"""Directions from the moments of two classes: what `measure` can estimate while it streams.

Each takes the moments of the harmless and of the harmful prompts, with arrays (..., d), and
returns vectors (..., d). A vector's length is the gap of the class means along it, so that adding
it once moves a harmless mean as far as the harmful one lies. Knows moments; reads no prompt.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from vauban.activations import ActivationMoments
from vauban.directions.loud_coordinates import (
    LOUD_MULTIPLE,
    MASKED,
    check_multiple,
    standing_out,
)
from vauban.errors import InputError, shown

Estimator = Callable[[ActivationMoments, ActivationMoments], mx.array]
"""(harmless, harmful) -> vectors in the shape of the means."""

METHODS = ("mean_difference", MASKED, "variance_scaled")


def estimator(method: Any, loud_multiple: float | None = None) -> Estimator:
    """The estimator of a name; InputError for another name, or a multiple that it does not take."""
    if method not in METHODS:
        near = difflib.get_close_matches(str(method), METHODS, n=1, cutoff=0.4)
        raise InputError(
            f"method is {shown(method)}; measure() estimates {', '.join(map(repr, METHODS))}"
            + (f". Did you mean {near[0]!r}?" if near else "")
        )
    if method == MASKED:
        multiple = LOUD_MULTIPLE if loud_multiple is None else loud_multiple
        return partial(masked_difference, multiple=check_multiple(multiple))
    if loud_multiple is not None:
        raise InputError(f"loud_multiple belongs to method={MASKED!r}; the method is {method!r}")
    return mean_difference if method == "mean_difference" else scaled_difference


def mean_difference(low: ActivationMoments, high: ActivationMoments) -> mx.array:
    """mean(harmful) - mean(harmless): Arditi et al. 2024, eq. 1."""
    return high.mean - low.mean


def masked_difference(
    low: ActivationMoments, high: ActivationMoments, *, multiple: float = LOUD_MULTIPLE
) -> mx.array:
    """The difference in means, zero where the harmless mean stands out (`loud_coordinates`)."""
    difference = high.mean - low.mean
    mask = standing_out(np.array(low.mean), multiple)
    return mx.where(mx.array(mask), mx.zeros_like(difference), difference)


def check_mask(
    vector: mx.array, low: mx.array, high: mx.array, masked: Sequence[int], place: str = ""
) -> None:
    """InputError where a mask took all of the difference between two means (d,)."""
    if masked and not bool((vector != 0).any()) and bool((low != high).any()):
        names = ", ".join(map(str, masked[:5])) + (", ..." if len(masked) > 5 else "")
        raise InputError(
            f"the mask leaves nothing of the difference{place}: the means differ in coordinates "
            f"that stand out alone ({names}); raise loud_multiple, or use method='variance_scaled'"
        )


def pooled_variance(low: ActivationMoments, high: ActivationMoments) -> np.ndarray:
    """Within-class variance (..., d) in float64, n - 2 degrees of freedom."""
    squares = [np.array(one.variance, np.float64) * max(one.count - 1, 0) for one in (low, high)]
    return (squares[0] + squares[1]) / max(low.count + high.count - 2, 1)


def scaled_difference(low: ActivationMoments, high: ActivationMoments) -> mx.array:
    """Δ_c / v_c, the weights of diagonal linear discriminant analysis, at the length of the gap.

    v is the pooled within-class variance, shrunk towards its median t: (1 - λ) s² + λ t. The
    independence rule is Dudoit, Fridlyand and Speed's (2002; Bickel and Levina 2004 on why it
    holds where n < d); the target and the intensity λ = Σ Var(s²) / Σ (s² - t)², at most 1, are
    Opgen-Rhein and Strimmer's (2007), with Var(s²) = 2 s⁴ / (n - 2) as normal samples have it, so
    that no fourth moments are needed. Few samples give λ = 1, the plain difference.
    """
    difference = np.array(high.mean, np.float64) - np.array(low.mean, np.float64)
    variance = pooled_variance(low, high)
    target = np.median(variance, axis=-1, keepdims=True)
    # More than half of the coordinates may be constant: their median says nothing then.
    target = np.where(target > 0, target, variance.mean(axis=-1, keepdims=True))
    relative = np.divide(variance, target, out=np.ones_like(variance), where=target > 0)
    noise = 2.0 / max(low.count + high.count - 2, 1) * (relative**2).sum(-1, keepdims=True)
    distance = ((relative - 1.0) ** 2).sum(-1, keepdims=True)
    shrink = np.minimum(1.0, noise / np.maximum(distance, 1e-300))
    weights = difference / ((1.0 - shrink) * relative + shrink)
    units = weights / np.maximum(np.linalg.norm(weights, axis=-1, keepdims=True), 1e-300)
    gap = (difference * units).sum(axis=-1, keepdims=True)
    return mx.array((gap * units).astype(np.float32))
