"""Winsorisation: cap the components of activations at their quantiles. Knows arrays only."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from vauban.errors import InputError


def winsorize(values: mx.array, quantile: float) -> mx.array:
    """Clip each residual's components to their [quantile, 1 - quantile] quantiles.

    `values` is (n, R, ...): thresholds are computed per residual (axis 1), pooled over the
    prompts of both classes and all components, so that a "massive activation" of a few
    components cannot dominate a class mean. 0 clips nothing; raises InputError outside [0, 0.5).

    >>> import mlx.core as mx
    >>> winsorize(mx.array([[[0.0, 1.0, 2.0, 3.0, 900.0]]]), 0.25).tolist()
    [[[1.0, 1.0, 2.0, 3.0, 3.0]]]
    """
    if not 0.0 <= quantile < 0.5:
        raise InputError(f"clip_quantile is {quantile}; expected 0 <= q < 0.5")
    if values.ndim < 2:
        raise InputError(f"values have shape {values.shape}; expected (n, residuals, ...)")
    if quantile == 0.0:
        return values
    clipped = []
    for r in range(values.shape[1]):
        part = np.array(values[:, r].astype(mx.float32))
        low, high = np.quantile(part, [quantile, 1.0 - quantile])
        clipped.append(mx.array(np.clip(part, low, high)))
    return mx.stack(clipped, axis=1)
