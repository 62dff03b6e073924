"""What a matrix must put out for the norm behind it to give a vector. Arrays only.

Some families norm what an MLP writes: the stream gets g ∘ y √d / ‖y‖. Such a norm has no inverse,
its outputs are the points of an ellipsoid; but the nearest of those to a wanted vector can be
computed, and any length of y gives it.
"""

from __future__ import annotations

import numpy as np

# Halvings of the interval for the multiplier: more than float64 has digits.
_HALVINGS = 200


def nearest_normed(wanted: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Unit rows u (n, d) whose g ∘ u √d lies nearest to the rows of `wanted` (n, d).

    The point of an ellipsoid nearest to v fulfils (g² + μ) u = g v / √d, and ‖u‖ falls with μ, so μ
    is found by halving.

    >>> import numpy as np
    >>> nearest_normed(np.array([[3.0, 4.0]]), np.ones(2)).round(12).tolist()
    [[0.6, 0.8]]
    """
    g = np.asarray(gain, np.float64) * np.sqrt(len(gain))
    pull, square = g * np.asarray(wanted, np.float64), g**2
    size = np.linalg.norm(pull, axis=1, keepdims=True)
    # At the first bound ‖u‖ >= 1 (one component alone), at the last one ‖u‖ <= 1.
    low = (np.abs(pull) - square).max(axis=1, keepdims=True)
    high = np.maximum(size - square.min(), low)
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        long = ((pull / np.maximum(square + middle, 1e-300)) ** 2).sum(1, keepdims=True) > 1
        low, high = np.where(long, middle, low), np.where(long, high, middle)
    unit = pull / np.maximum(square + 0.5 * (low + high), 1e-300)
    length = np.linalg.norm(unit, axis=1, keepdims=True)
    return np.asarray(unit / np.where(length > 0, length, 1.0))


def before_norm(change: np.ndarray, output: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """What to add to a matrix's `output` (n, d) so that the norm behind it puts out `change` more.

    The rows have the output's lengths, and the norm gives the point nearest to what is wanted.
    """
    length = np.linalg.norm(output, axis=1, keepdims=True)
    before = gain * output * (np.sqrt(output.shape[1]) / np.where(length > 0, length, 1.0))
    added: np.ndarray = length * nearest_normed(before + change, gain) - output
    return added
