"""Which affine grid a group gets: the stored one, or a fresh one where that rounds clearly better.

A cut can shrink a row's range so much that its stored grid is far too wide. And a weight that lies
on its grid costs a whole step to move, one between two codes next to nothing: what is to be rounded
well is the SHIFTED target. NumPy, and mlx for its float types; sees no module.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from vauban.edits.staircase import inverse
from vauban.edits.two_sided import Shifts, parallel

# A fresh grid is taken where it has less than this share of the stored one's squared error.
_CLEARLY = 0.9
# In squared steps per weight: less than this is float32's own noise.
_ON_GRID = 1e-6
# No group rounds better than this on a grid that spans it, but by luck: the mean is a twelfth.
_LUCKY = 1 / 48
# Weights that are looked at together: long enough for NumPy, short enough for a core's cache.
_AT_ONCE = 1 << 18


def refit(
    target: np.ndarray,
    scales: mx.array,
    biases: mx.array,
    bits: int,
    group: int,
    shifts: Shifts | None = None,
) -> tuple[mx.array, mx.array]:
    """Scales and offsets (out, in/group) for `target` (out, in), in the dtype of the stored ones.

    >>> w = mx.random.normal((8, 64), key=mx.random.key(0))
    >>> _, s, b = mx.quantize(w, group_size=64, bits=4)
    >>> bool(mx.array_equal(refit(np.array(w), s, b, 4, 64)[0], s))
    True
    >>> bool((mx.abs(refit(np.array(w), 9 * s, b, 4, 64)[0]) < 2 * mx.abs(s)).all())
    True
    """
    fresh = fresh_grid(target, bits, group, scales.dtype, shifts)
    kept, new = (
        [np.array(a.astype(mx.float32)) for a in grid] for grid in ((scales, biases), fresh)
    )
    better = np.empty(scales.shape, bool)

    def compare(first: int) -> None:
        rows = slice(first, first + each)
        x = _part(target, group, rows, shifts)
        old_error = _error(x, kept[0][rows], kept[1][rows], bits)
        least = np.maximum(_ON_GRID * kept[0][rows] ** 2, _LUCKY * new[0][rows] ** 2)
        open_groups = np.nonzero(old_error > group * least)
        fresh_step, fresh_offset = (a[rows][open_groups] for a in new)
        new_error = _error(x[open_groups], fresh_step, fresh_offset, bits)
        better[rows] = False
        better[rows][open_groups] = new_error < _CLEARLY * old_error[open_groups]

    each = max(1, _AT_ONCE // target.shape[1])
    parallel(compare, range(0, len(better), each))
    taken = mx.array(better)
    return mx.where(taken, fresh[0], scales), mx.where(taken, fresh[1], biases)


def fresh_grid(
    target: np.ndarray, bits: int, group: int, dtype: mx.Dtype, shifts: Shifts | None = None
) -> tuple[mx.array, mx.array]:
    """Scales and offsets of the (shifted) target's own bounds."""
    shape = (target.shape[0], target.shape[1] // group)
    low, high = np.empty(shape, np.float32), np.empty(shape, np.float32)

    def bounds(first: int) -> None:
        rows = slice(first, first + each)
        x = _part(target, group, rows, shifts)
        low[rows], high[rows] = _folded(np.minimum, x), _folded(np.maximum, x)

    each = max(1, _AT_ONCE // target.shape[1])
    parallel(bounds, range(0, shape[0], each))
    step, offset = affine_grid(low, high, bits)
    return mx.array(step).astype(dtype), mx.array(offset).astype(dtype)


def _folded(either: np.ufunc, x: np.ndarray) -> np.ndarray:
    """`either.reduce(x, -1)` of (..., a power of two): on rows so short four times faster."""
    flat = x.reshape(-1)
    while flat.size > x.size // x.shape[-1]:
        flat = either(flat[::2], flat[1::2])
    return flat.reshape(x.shape[:-1])


def _part(t: np.ndarray, group: int, rows: slice, shifts: Shifts | None) -> np.ndarray:
    """Some rows of the (shifted) target, by groups."""
    part = t[rows] if shifts is None else shifts.shifted(t[rows], rows)
    return part.reshape(len(part), -1, group)


def affine_grid(low: np.ndarray, high: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset from a group's bounds, as `mx.quantize` chooses them.

    The bound that is larger in size is the offset, and the step divides it, so that zero is a code.
    """
    under = np.abs(low) > np.abs(high)
    step = np.maximum((high - low) / (2**bits - 1), 1e-7)
    step = np.where(under, step, -step).astype(np.float32)
    edge = np.where(under, low, high)
    codes = np.rint(edge / step)
    at_zero = codes == 0
    step = np.where(at_zero, step, edge / np.where(at_zero, 1.0, codes)).astype(np.float32)
    return step, np.where(at_zero, 0.0, edge).astype(np.float32)


def _error(x: np.ndarray, step: np.ndarray, offset: np.ndarray, bits: int) -> np.ndarray:
    """Squared rounding error of each group."""
    off = x - offset[..., None]
    off *= inverse(step)[..., None]
    codes = np.rint(off)
    off -= np.clip(codes, 0, 2**bits - 1, out=codes)
    found: np.ndarray = np.einsum("...i,...i->...", off, off) * step**2
    # A group without steps rounds everything to its offset.
    flat = step == 0
    found[flat] = ((x - offset[..., None])[flat] ** 2).sum(-1)
    return found
