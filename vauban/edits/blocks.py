"""A module's matrix, packed or not, in float32 by blocks of rows: as stored, and as edited.

Experts one by one; memory stays near one block. What acts inside the matrix (norm modes,
protection, sparse rows) is computed on the whole of it. Knows modules and updates; writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from vauban._arrays import unpack
from vauban.edits.modules import refuse_unknown_packing
from vauban.edits.update import Update
from vauban.errors import InputError

# Elements of a matrix that are unpacked at a time.
BLOCK = 1 << 20


@dataclass(frozen=True)
class Stored:
    """One matrix of a module: its only one, or an expert's."""

    module: nn.Module
    expert: int | None = None

    def array(self, name: str) -> mx.array | None:
        value = self.module.get(name)
        return value if value is None or self.expert is None else value[self.expert]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) unpacked."""
        weight = self.array("weight")
        assert weight is not None
        rows, columns = weight.shape
        return rows, columns * 32 // self.module.bits if "scales" in self.module else columns

    def rows(self, part: slice) -> mx.array:
        """Some rows in float32."""
        weight = self.array("weight")
        assert weight is not None
        if "scales" not in self.module:
            return weight[part].astype(mx.float32)
        m = self.module
        return unpack(
            weight[part], *self.grid(part), m.group_size, m.bits, getattr(m, "mode", "affine")
        )

    @property
    def whole(self) -> mx.array:
        """All of it in float32."""
        return self.rows(slice(0, self.shape[0]))

    def grid(self, part: slice) -> tuple[mx.array, mx.array | None]:
        """The stored scales and offsets of some rows; float modes have no offsets."""
        scales, offsets = self.array("scales"), self.array("biases")
        assert scales is not None
        return scales[part], None if offsets is None else offsets[part]

    @property
    def scale_dtype(self) -> mx.Dtype:
        """The float type that new scales are stored in: that of the old ones."""
        if "scales" not in self.module:
            return self.module.weight.dtype
        kept = self.module.scales.dtype
        return mx.bfloat16 if kept == mx.uint8 else kept


def matrices(module: nn.Module) -> list[Stored]:
    """The module's matrix, or that of each of its experts."""
    refuse_unknown_packing(module)
    if module.weight.ndim == 3:
        return [Stored(module, e) for e in range(module.weight.shape[0])]
    return [Stored(module)]


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows of about `BLOCK` elements at a time."""
    step = max(1, BLOCK // shape[1])
    return (slice(i, min(i + step, shape[0])) for i in range(0, shape[0], step))


def edited_blocks(stored: Stored, update: Update) -> Iterator[tuple[slice, mx.array, mx.array]]:
    """(rows, W there, W' there) in float32, block after block.

    A plain cut needs U W first (one pass over the rows), then W - α Uᵀ (U W) row by row.
    """
    u, alpha = update.basis, update.alpha
    if not update.acts_on_outputs:
        whole = stored.whole
        yield slice(0, stored.shape[0]), whole, update.weight(whole)
        return
    removed = mx.zeros((len(u), stored.shape[1]))
    if not update.writes_rows:
        for rows in row_blocks(stored.shape):
            removed = removed + u[:, rows] @ stored.rows(rows)
            mx.eval(removed)
    for rows in row_blocks(stored.shape):
        block = stored.rows(rows)
        if update.writes_rows:
            edited = block - alpha * (block @ u.T) @ u
            yield rows, block, edited if update.offset is None else edited + update.offset
        else:
            yield rows, block, block - alpha * (u[:, rows].T @ removed)


def float_dtype(module: nn.Module) -> mx.Dtype:
    """What an edited matrix is stored in when it is stored unpacked."""
    if "scales" not in module:
        return module.weight.dtype
    return module.scales.dtype if module.get("biases") is not None else mx.bfloat16


def edited_rows(module: nn.Module, update: Update) -> Iterator[mx.array]:
    """W' in row order, expert after expert, in `float_dtype`.

    Raises InputError for weights that are NaN or inf, or become so in that type.
    """
    dtype = float_dtype(module)
    for stored in matrices(module):
        for _, _, edited in edited_blocks(stored, update.of_expert(stored.expert)):
            rows = edited.astype(dtype)
            if not bool(mx.isfinite(rows).all()):
                raise InputError(f"{update.path}.weight becomes NaN or inf; nothing was written")
            yield rows
