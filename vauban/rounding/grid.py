"""The number grids of MLX's packed formats: their values, their codes, and scales for a group.

An affine group holds the integers 0 … 2^bits - 1 times a scale, plus an offset; mxfp4, nvfp4 and
mxfp8 hold the signed values of a small float times a scale. Knows no direction.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from vauban.errors import InputError

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
# Bits of a code and size of a group.
FLOAT_MODES = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
# Weights that are looked at together: a megabyte, which stays in a core's cache.
_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class Grid:
    """Sorted `values` in units of the scale, and the stored code of each."""

    values: np.ndarray = field(repr=False)
    codes: np.ndarray = field(repr=False)
    bits: int
    uniform: bool

    @property
    def top(self) -> int:
        """The last index."""
        return len(self.values) - 1

    def round(self, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Indices of the nearest values, as floats; in place of `out` where given."""
        if self.uniform:
            out = np.rint(x, out=out)
        else:
            middles = (self.values[1:] + self.values[:-1]) / 2
            index = np.searchsorted(middles, x).astype(x.dtype)
            if out is None:
                out = index
            else:
                out[...] = index
        return np.clip(out, 0, self.top, out=out)

    def value(self, index: np.ndarray) -> np.ndarray:
        """The values of indices (floats in, floats out)."""
        return index if self.uniform else self.values[index.astype(np.int64)].astype(index.dtype)


@lru_cache
def grid_of(mode: str, bits: int) -> Grid:
    """The grid of a packed format. Raises InputError for a format MLX does not have."""
    if mode == "affine":
        if bits not in AFFINE_BITS:
            raise InputError(f"{bits} bits; affine formats have one of {AFFINE_BITS}")
        steps = np.arange(2**bits, dtype=np.float64)
        return Grid(steps, steps.astype(np.uint8), bits, True)
    if mode not in FLOAT_MODES:
        raise InputError(f"mode {mode!r}; expected 'affine' or one of {tuple(FLOAT_MODES)}")
    bits = FLOAT_MODES[mode][0]
    codes = np.arange(2**bits, dtype=np.uint8)
    values = e4m3(codes) if bits == 8 else _small_float(codes, 2, 1)
    # The sign bit alone is a second zero, which is never written.
    usable = np.flatnonzero(np.isfinite(values) & (codes != 1 << (bits - 1)))
    order = usable[np.argsort(values[usable], kind="stable")]
    return Grid(values[order], codes[order], bits, False)


def _small_float(codes: np.ndarray, exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """Sign, exponent, mantissa: (-1)^s 2^(e - bias) (1 + m), and subnormals for e = 0."""
    bias = 2 ** (exponent_bits - 1) - 1
    mantissa = (codes & (2**mantissa_bits - 1)) / 2**mantissa_bits
    exponent = (codes >> mantissa_bits & (2**exponent_bits - 1)).astype(np.int64)
    size = np.ldexp(mantissa + (exponent > 0), np.maximum(exponent, 1) - bias)
    sign = np.where(codes >> (exponent_bits + mantissa_bits), -1.0, 1.0)
    values: np.ndarray = sign * size
    return values


def e4m3(codes: np.ndarray) -> np.ndarray:
    """Bytes as 8-bit floats, without infinities; 0x7f and 0xff are NaN."""
    return np.where(codes & 0x7F == 0x7F, np.nan, _small_float(codes, 4, 3))


def scale_values(scales: np.ndarray, mode: str) -> np.ndarray:
    """Stored scales as float32: floats as they are, bytes of the float modes decoded.

    Those are 8-bit floats of nvfp4, and powers of two of mxfp4 and mxfp8.
    """
    if scales.dtype != np.uint8:
        return scales.astype(np.float32)
    if mode == "nvfp4":
        return e4m3(scales).astype(np.float32)
    return np.ldexp(np.float32(1.0), scales.astype(np.int32) - 127).astype(np.float32)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (..., n) as a little-endian bit stream per row: uint32 (..., n · bits / 32)."""
    codes = np.ascontiguousarray(codes, dtype=np.uint8)
    if codes.shape[-1] * bits % 32:
        raise InputError(f"{codes.shape[-1]} codes of {bits} bits do not fill 32-bit words")
    if bits == 8:
        return codes.view("<u4")
    if bits in (2, 4):
        each = 8 // bits
        parts = codes.reshape(*codes.shape[:-1], -1, each)
        out = np.zeros(parts.shape[:-1], dtype=np.uint8)
        for i in range(each):
            out |= parts[..., i] << np.uint8(i * bits)
        return out.view("<u4")
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    flat = stream.reshape(*codes.shape[:-1], -1)
    return np.packbits(flat, axis=-1, bitorder="little").view("<u4")


def fresh_grid(target: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset (out, in/group) of each group's bounds, as `mx.quantize` chooses them.

    The bound that is larger in size is the offset, and the step divides it, so that zero is a code.
    """
    groups = target.reshape(len(target), -1, group)
    low, high = groups.min(-1), groups.max(-1)
    under = np.abs(low) > np.abs(high)
    step = np.maximum((high - low) / (2**bits - 1), 1e-7)
    step = np.where(under, step, -step).astype(np.float32)
    edge = np.where(under, low, high)
    codes = np.rint(edge / step)
    at_zero = codes == 0
    step = np.where(at_zero, step, edge / np.where(at_zero, 1.0, codes)).astype(np.float32)
    return step, np.where(at_zero, 0.0, edge).astype(np.float32)


def fresh_is_better(
    target: np.ndarray, stored: tuple[np.ndarray, np.ndarray], fresh: tuple[np.ndarray, np.ndarray],
    bits: int,
) -> np.ndarray:  # fmt: skip
    """(out, in/group) bool: where a fresh affine grid rounds a group of the target better.

    A cut can shrink a group's range so much that its stored grid is far too wide; a group that was
    hardly cut still lies on its stored grid. `stored` and `fresh` are (scale, offset), each
    (out, in/group).
    """
    better = np.empty(stored[0].shape, bool)
    groups = target.reshape(*better.shape, -1)

    def error(rows: slice, step: np.ndarray, offset: np.ndarray) -> np.ndarray:
        step, offset = step[rows, :, None], offset[rows, :, None]
        codes = groups[rows] - offset
        codes *= inverse(step)
        np.clip(np.rint(codes, out=codes), 0, 2**bits - 1, out=codes)
        codes *= step
        codes += offset
        codes -= groups[rows]
        total: np.ndarray = np.einsum("...i,...i->...", codes, codes)
        return total

    def compare(rows: slice) -> None:
        better[rows] = error(rows, *fresh) < error(rows, *stored)

    parallel(compare, len(better), max(1, _AT_ONCE // target.shape[1]))
    return better


def inverse(step: np.ndarray) -> np.ndarray:
    """1/s, and 0 where s = 0: such a code changes nothing."""
    return np.divide(1.0, step, out=np.zeros_like(step), where=step != 0)


def parallel(work: Callable[[slice], None], rows: int, each: int) -> None:
    """Do `work` on slices of `each` rows, in as many threads as there are cores.

    NumPy releases the interpreter lock in its loops.
    """
    parts = [slice(first, min(first + each, rows)) for first in range(0, rows, each)]
    if len(parts) == 1:
        work(parts[0])
        return
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        list(pool.map(work, parts))
