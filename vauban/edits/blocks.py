"""A module's matrix read in float32 part by part, packed or not; experts one by one.

Knows mlx modules and slices; edits nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from vauban.edits.modules import refuse_unknown_packing, unpack

# Elements of a matrix that are unpacked at a time.
BLOCK = 1 << 20


@dataclass(frozen=True)
class Stored:
    """One matrix of a module, unpacked part by part."""

    module: nn.Module
    expert: int | None = None

    def array(self, name: str) -> mx.array | None:
        value = self.module.get(name)
        return value if value is None or self.expert is None else value[self.expert]

    @property
    def shape(self) -> tuple[int, int]:
        weight = self.array("weight")
        assert weight is not None
        rows, columns = weight.shape
        return rows, columns * 32 // self.module.bits if "scales" in self.module else columns

    def part(self, rows: slice, columns: slice) -> mx.array:
        """(rows, columns) in float32; column bounds are multiples of 32 and of the group."""
        weight = self.array("weight")
        assert weight is not None
        if "scales" not in self.module:
            return weight[rows, columns].astype(mx.float32)
        m = self.module
        words = slice(columns.start * m.bits // 32, columns.stop * m.bits // 32)
        groups = slice(columns.start // m.group_size, columns.stop // m.group_size)
        scales, biases = self.array("scales"), self.array("biases")
        assert scales is not None
        return unpack(
            weight[rows, words], scales[rows, groups],
            None if biases is None else biases[rows, groups], m.group_size, m.bits,
            getattr(m, "mode", "affine"),
        )  # fmt: skip

    @property
    def whole(self) -> mx.array:
        """All of it in float32."""
        rows, columns = self.shape
        return self.part(slice(0, rows), slice(0, columns))

    def grid(self, rows: slice, columns: slice) -> tuple[mx.array, mx.array | None]:
        """The stored scales and offsets of a part; column bounds are multiples of the group."""
        group = self.module.group_size
        groups = slice(*(end and end // group for end in (columns.start, columns.stop)))
        scales, biases = self.array("scales"), self.array("biases")
        assert scales is not None
        return scales[rows, groups], None if biases is None else biases[rows, groups]

    @property
    def scale_dtype(self) -> mx.Dtype:
        """The float type that new scales are stored in: that of the old ones."""
        if "scales" not in self.module:
            return self.module.weight.dtype
        kept = self.module.scales.dtype
        return mx.bfloat16 if kept == mx.uint8 else kept


def blocks(
    shape: tuple[int, int], by_rows: bool, unit: int, size: int | None = None
) -> Iterator[tuple[slice, slice]]:
    """Blocks of `size` elements (`BLOCK`): whole rows of a table, whole columns of a matrix."""
    rows, columns = shape
    size = size or BLOCK
    if by_rows:
        step = max(1, size // columns)
        for start in range(0, rows, step):
            yield slice(start, min(rows, start + step)), slice(0, columns)
        return
    step = max(unit, size // rows // unit * unit)
    for start in range(0, columns, step):
        yield slice(0, rows), slice(start, min(columns, start + step))


def matrices(module: nn.Module) -> list[Stored]:
    """The module's matrix, or that of each of its experts."""
    refuse_unknown_packing(module)
    if module.weight.ndim == 3:
        return [Stored(module, e) for e in range(module.weight.shape[0])]
    return [Stored(module)]


def direction_norm(
    module: nn.Module, basis: mx.array, of_rows: bool, offset: mx.array | None = None
) -> float:
    """‖U W‖ over all experts, or ‖W Uᵀ‖ for a table, read block by block.

    A table's rows count without `offset` (out,), where they were given one.
    """
    total = 0.0
    for stored in matrices(module):
        parts: mx.array | None = None
        for rows, columns in blocks(stored.shape, True, 1):
            block = stored.part(rows, columns)
            if of_rows:
                block = block if offset is None else block - offset
                total += float(((block @ basis.T) ** 2).sum())
                continue
            part = basis[:, rows] @ block
            parts = part if parts is None else parts + part
            mx.eval(parts)
        if parts is not None:
            total += float((parts**2).sum())
    return total**0.5
