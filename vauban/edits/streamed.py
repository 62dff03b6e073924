"""The edited float matrix of a module as a stream of row blocks.

Knows mlx modules; writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from vauban.edits.blocks import blocks, matrices
from vauban.edits.update import Update


def float_dtype(module: nn.Module) -> mx.Dtype:
    """What an edited matrix is stored in when it is stored unpacked."""
    if "scales" not in module:
        return module.weight.dtype
    return module.scales.dtype if module.get("biases") is not None else mx.bfloat16


def edited_rows(module: nn.Module, update: Update) -> Iterator[mx.array]:
    """W' in row order, expert after expert, in `float_dtype`; peak memory is one block.

    A plain cut needs U W first (one pass over the rows), then W - α Uᵀ (U W) row by row. What
    acts inside the matrix (norm modes, protection, sparse rows) is computed on the whole of it.
    """
    dtype = float_dtype(module)
    if not update.acts_on_outputs:
        for stored in matrices(module):
            yield update.of_expert(stored.expert).weight(stored.whole).astype(dtype)
        return
    u, alpha = update.basis, update.alpha
    for stored in matrices(module):
        taken: mx.array | None = None
        if not update.writes_rows:
            for rows, columns in blocks(stored.shape, True, 1):
                part = u[:, rows] @ stored.part(rows, columns)
                taken = part if taken is None else taken + part
                mx.eval(taken)
        for rows, columns in blocks(stored.shape, True, 1):
            block = stored.part(rows, columns)
            if taken is None:
                row = block - alpha * (block @ u.T) @ u
                yield (row if update.offset is None else row + update.offset).astype(dtype)
            else:
                yield (block - alpha * (u[:, rows].T @ taken)).astype(dtype)
