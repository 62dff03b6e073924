"""A checkpoint's parameters as the files hold them: read in blocks of rows, packed ones unpacked.

Knows safetensors, packed formats and mlx-lm's adapters; opens no model and computes no figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from vauban._arrays import unpack
from vauban.errors import ModelError
from vauban.export.tensor_files import TensorOnDisk, stored_tensors

# Bits of the significand behind the point.
_SIGNIFICAND = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}
_PACKED_SIGNIFICAND = {"mxfp4": 1, "nvfp4": 1, "mxfp8": 3}
_NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?", "U8": "u1", "I8": "i1",
    "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8", "I64": "<i8",
}  # fmt: skip
_MLX = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U8": mx.uint8}
_LARGEST_FP4 = 6.0


@dataclass(frozen=True)
class Packing:
    """A packed format as mlx names it."""

    bits: int
    group_size: int
    mode: str

    @property
    def label(self) -> str:
        return f"{self.bits}-bit {self.mode} g{self.group_size}"


@dataclass(frozen=True, eq=False)
class StoredParameter:
    """One parameter: its tensor, and a packed one's scales and offsets.

    `shape` is the unpacked one. All axes but the last are rows.
    """

    name: str
    parts: dict[str, TensorOnDisk]
    packing: Packing | None
    shape: tuple[int, ...]

    @property
    def format(self) -> str:
        """Its packing, or the name of its type."""
        return self.packing.label if self.packing else self.parts["weight"].dtype

    @property
    def numeric(self) -> bool:
        """Whether it holds numbers that can be subtracted; else bytes alone are compared."""
        return self.packing is not None or self.parts["weight"].dtype in _SIGNIFICAND

    @property
    def nbytes(self) -> int:
        return sum(part.end - part.start for part in self.parts.values())

    def same_bytes(self, other: StoredParameter) -> bool:
        """Whether both are stored alike, byte for byte."""
        if self.format != other.format or self.parts.keys() != other.parts.keys():
            return False
        pairs = [(part, other.parts[key]) for key, part in self.parts.items()]
        if any((a.dtype, a.shape) != (b.dtype, b.shape) for a, b in pairs):
            return False
        return all(x == y for a, b in pairs for x, y in zip(a.chunks(), b.chunks(), strict=True))

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Some rows in float32."""
        if self.packing is None:
            return _read(self.parts["weight"], start, stop)
        weight, scales, offsets = (self._part(n, start, stop) for n in _PACKED)
        assert weight is not None and scales is not None
        form = self.packing
        if form.mode == "affine" and offsets is None:
            offsets = mx.zeros(scales.shape, scales.dtype)
        return np.array(unpack(weight, scales, offsets, form.group_size, form.bits, form.mode))

    def steps(self, values: np.ndarray, start: int, stop: int) -> np.ndarray:
        """The distance between neighbouring storable numbers at each of the values."""
        form = self.packing
        if form is None:
            return _power_of_two(values) * np.float32(
                2.0 ** -_SIGNIFICAND[self.parts["weight"].dtype]
            )
        if form.mode == "affine":
            scales = np.abs(_read(self.parts["scales"], start, stop))
            return np.repeat(scales, form.group_size, axis=1)
        steps = _power_of_two(values) * np.float32(2.0 ** -_PACKED_SIGNIFICAND[form.mode])
        if form.bits > 4:
            return steps
        groups = np.abs(values).reshape(len(values), -1, form.group_size).max(axis=2)
        # Below one the codes of fp4 lie half a scale apart; the scale is the largest over six.
        return np.maximum(steps, np.repeat(groups / (2 * _LARGEST_FP4), form.group_size, axis=1))

    def _part(self, name: str, start: int, stop: int) -> mx.array | None:
        tensor = self.parts.get(name)
        if tensor is None:
            return None
        raw = _raw(tensor, start, stop)
        if tensor.dtype == "U32":
            return mx.array(raw)
        array = mx.array(raw.view(np.uint8))
        return array.view(_MLX[tensor.dtype]).reshape(raw.shape)


_PACKED = ("weight", "scales", "biases")


def stored_parameters(folder: Path, config: Mapping[str, Any]) -> dict[str, StoredParameter]:
    """The parameters of a folder by the names in its files; a packed one counts once.

    Raises ModelError for a truncated file, and for packed tensors whose sizes do not fit what
    config.json says of their format.
    """
    stored = stored_tensors(folder)
    parameters: dict[str, StoredParameter] = {}
    taken: set[str] = set()
    for name, tensor in stored.items():
        path = name.removesuffix(".weight")
        if path == name or tensor.dtype != "U32" or f"{path}.scales" not in stored:
            continue
        parts = {part: stored[n] for part in _PACKED if (n := f"{path}.{part}") in stored}
        form, width = _packing(folder, config, path, parts)
        parameters[name] = StoredParameter(name, parts, form, (*tensor.shape[:-1], width))
        taken |= {f"{path}.{part}" for part in parts}
    for name, tensor in stored.items():
        if name not in taken:
            parameters[name] = StoredParameter(name, {"weight": tensor}, None, tensor.shape)
    return parameters


def _packing(
    folder: Path, config: Mapping[str, Any], path: str, parts: Mapping[str, TensorOnDisk]
) -> tuple[Packing, int]:
    """The format of a packed module and the width of its matrix."""
    general = config.get("quantization") or config.get("quantization_config") or {}
    special = general.get(path)
    facts = {**general, **special} if isinstance(special, dict) else general
    packed, groups = parts["weight"].shape[-1], parts["scales"].shape[-1]
    try:
        mode = str(facts.get("mode", "affine"))
        form = Packing(int(facts["bits"]), int(facts["group_size"]), mode)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{folder / 'config.json'}: {path} is packed, but `quantization` does not say how; "
            "expected bits and group_size"
        ) from error
    if mode != "affine" and mode not in _PACKED_SIGNIFICAND:
        raise ModelError(
            f"{folder / 'config.json'}: {path} is packed as {mode!r}; expected affine, "
            f"{', '.join(_PACKED_SIGNIFICAND)}"
        )
    width = groups * form.group_size
    if packed * 32 != width * form.bits:
        raise ModelError(
            f"{folder / 'config.json'} says {form.label} of {path}; its {packed} words and "
            f"{groups} scales a row do not fit that"
        )
    return form, width


def _raw(tensor: TensorOnDisk, start: int, stop: int) -> np.ndarray:
    """Some rows as they are stored (bfloat16 as uint16)."""
    columns = tensor.shape[-1] if tensor.shape else 1
    kind = np.dtype(_NUMPY[tensor.dtype])
    offset = tensor.start + start * columns * kind.itemsize
    flat = np.fromfile(tensor.file, kind, (stop - start) * columns, offset=offset)
    return flat.reshape(stop - start, columns)


def _read(tensor: TensorOnDisk, start: int, stop: int) -> np.ndarray:
    raw = _raw(tensor, start, stop)
    if tensor.dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def _power_of_two(values: np.ndarray) -> np.ndarray:
    """2^floor(log2 |v|): the exponent's bits alone."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (bits & np.uint32(0x7F800000)).view(np.float32)


def matrices_of(shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(first row, rows, columns) of each matrix of a parameter; () for a vector.

    A stack of experts has a matrix for each; a convolution's kernel, whose axes behind the first
    are short, is one.

    >>> matrices_of((4, 32, 64))[1]
    (32, 32, 64)
    >>> matrices_of((96, 4, 1))
    [(0, 384, 1)]
    >>> matrices_of((96,))
    []
    """
    if len(shape) < 2:
        return []
    rows, columns = prod(shape[:-1]), shape[-1]
    if len(shape) == 2 or min(shape[-2:]) < 16:
        return [(0, rows, columns)]
    return [(start, shape[-2], columns) for start in range(0, rows, shape[-2])]
