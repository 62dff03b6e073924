"""The number grids of MLX's packed formats: rounding, neighbours, codes, packing.

NumPy only; knows no matrix and no direction. Affine grids are the integers 0 … 2^bits - 1 (times a
scale, plus an offset); mxfp4, nvfp4 and mxfp8 are the signed values of a small float.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import mlx.core as mx
import numpy as np

from vauban.errors import InputError

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
FLOAT_MODES = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}


@dataclass(frozen=True)
class Grid:
    """Sorted `values` in units of the scale, and the stored code of each."""

    values: np.ndarray = field(repr=False)
    codes: np.ndarray = field(repr=False)
    bits: int
    uniform: bool

    @property
    def top(self) -> int:
        return len(self.values) - 1

    def round(self, x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Index of the nearest value, as floats, in place of `out` where given."""
        if self.uniform:
            out = np.rint(x, out=out)
        else:
            middles = (self.values[1:] + self.values[:-1]) / 2
            found = np.searchsorted(middles, x).astype(x.dtype)
            if out is None:
                out = found
            else:
                out[...] = found
        return np.clip(out, 0, self.top, out=out)

    def value(self, index: np.ndarray) -> np.ndarray:
        """The values of indices (floats in, floats out)."""
        return index if self.uniform else self.values[index.astype(np.int64)].astype(index.dtype)


def grid_of(mode: str, bits: int) -> Grid:
    """The grid of a packed format. Raises InputError for a format MLX does not have."""
    if mode == "affine":
        if bits not in AFFINE_BITS:
            raise InputError(f"{bits} bits; affine formats have one of {AFFINE_BITS}")
        steps = np.arange(2**bits, dtype=np.float64)
        return Grid(steps, steps.astype(np.uint8), bits, True)
    if mode not in FLOAT_MODES:
        raise InputError(f"mode {mode!r}; expected 'affine' or one of {tuple(FLOAT_MODES)}")
    return _float_grid(mode)


@lru_cache
def _float_grid(mode: str) -> Grid:
    """Every code of a float format, decoded by MLX itself and sorted by value."""
    bits, group = FLOAT_MODES[mode]
    count = 2**bits
    codes = np.resize(np.arange(count, dtype=np.uint8), max(count, group, 32))
    packed = mx.array(pack(codes[None], bits))
    # A scale byte that stands for 1: 127 is 2^0 in E8M0, 0x38 is 1.0 in E4M3.
    one = 0x38 if mode == "nvfp4" else 127
    scales = mx.full((1, codes.size // group), one, dtype=mx.uint8)
    decoded = mx.dequantize(packed, scales, None, group, bits, mode=mode, dtype=mx.float32)
    values = np.array(decoded)[0, :count].astype(np.float64)
    finite = np.flatnonzero(np.isfinite(values))
    # Of two codes for zero the positive one is written.
    order = [
        i
        for i in finite[np.argsort(values[finite], kind="stable")]
        if not _negative_zero(values, i)
    ]
    return Grid(values[order], np.array(order, dtype=np.uint8), bits, False)


def _negative_zero(values: np.ndarray, i: int) -> bool:
    return values[i] == 0.0 and i != int(np.flatnonzero(values == 0.0)[0])


def scale_values(scales: mx.array, mode: str) -> np.ndarray:
    """Stored scales as exact float32, including the byte formats of the float modes."""
    if scales.dtype != mx.uint8:
        return np.array(scales.astype(mx.float32))
    raw = np.array(scales)
    if mode == "nvfp4":
        return np.array(mx.from_fp8(scales, dtype=mx.float32))
    return np.ldexp(np.float32(1.0), raw.astype(np.int32) - 127).astype(np.float32)


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


def unpack_codes(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack`: uint8 codes (..., n)."""
    raw = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 8:
        return raw
    stream = np.unpackbits(raw, axis=-1, bitorder="little")
    parts = stream.reshape(*raw.shape[:-1], -1, bits)
    padded = np.concatenate([parts, np.zeros((*parts.shape[:-1], 8 - bits), np.uint8)], axis=-1)
    return np.packbits(padded, axis=-1, bitorder="little")[..., 0]
