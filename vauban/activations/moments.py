"""Streaming count, mean and variance (Welford 1962; merge of Chan, Golub and LeVeque 1979).

O(shape) memory whatever the number of samples. Knows arrays only.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from vauban.errors import InputError


class ActivationMoments:
    """Mean and variance of a stream of arrays of one shape, in float32.

    `update` takes a batch (n, ...); `merge` joins two independent streams exactly.

    >>> import mlx.core as mx
    >>> moments = ActivationMoments()
    >>> moments.update(mx.array([[1.0], [3.0]])).count, moments.mean.item()
    (2, 2.0)
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = mx.array(0.0)
        self._m2 = mx.array(0.0)

    def update(self, batch: mx.array) -> ActivationMoments:
        """Take in a batch (n, ...) and return self."""
        if batch.ndim < 1 or batch.shape[0] == 0:
            raise InputError(f"a batch of shape {batch.shape} holds no samples")
        x = batch.astype(mx.float32)
        mean = x.mean(axis=0)
        self._join(int(x.shape[0]), mean, ((x - mean) ** 2).sum(axis=0))
        return self

    def merge(self, other: ActivationMoments) -> ActivationMoments:
        """Take in another stream's moments and return self."""
        if other.count:
            self._join(other.count, other.mean, other._m2)
        return self

    def _join(self, count: int, mean: mx.array, m2: mx.array) -> None:
        if self.count and mean.shape != self.mean.shape:
            raise InputError(f"samples of shape {mean.shape} after {self.mean.shape}")
        if self.count == 0:
            self.count, self.mean, self._m2 = count, mean, m2
        else:
            total = self.count + count
            delta = mean - self.mean
            self.mean = self.mean + delta * (count / total)
            self._m2 = self._m2 + m2 + delta**2 * (self.count * count / total)
            self.count = total
        mx.eval(self.mean, self._m2)

    @property
    def variance(self) -> mx.array:
        """Unbiased variance (n - 1); zero for a single sample."""
        return self._m2 / max(self.count - 1, 1)

    def summary(self) -> str:
        return f"moments of {self.count} samples of shape {tuple(self.mean.shape)}"

    def to_dict(self) -> dict[str, Any]:
        return {"count": self.count, "shape": list(self.mean.shape)}
