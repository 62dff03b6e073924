"""What a stored matrix writes along a basis, and what a plan means it to write.

Read in blocks, experts one by one: memory stays near k rows and one block. Knows modules and
updates; judges nothing.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from vauban.edits import Update
from vauban.edits.blocks import matrices, row_blocks


def rows_along(
    module: nn.Module, basis: mx.array, of_rows: bool, offset: mx.array | None = None
) -> mx.array:
    """U W in float32: (k, in), of stacked experts (E, k, in), of a table (k, rows).

    A table's rows count without `offset` (out,), where they were given one.
    """
    matrices_rows = []
    for stored in matrices(module):
        tables: list[mx.array] = []
        total: mx.array | None = None
        for rows in row_blocks(stored.shape):
            block = stored.rows(rows)
            if of_rows:
                block = block if offset is None else block - offset
                tables.append(basis @ block.T)
                mx.eval(tables[-1])
            else:
                part = basis[:, rows] @ block
                total = part if total is None else total + part
                mx.eval(total)
        matrices_rows.append(mx.concatenate(tables, axis=1) if total is None else total)
    return mx.stack(matrices_rows) if module.weight.ndim == 3 else matrices_rows[0]


def planned_rows(module: nn.Module, update: Update) -> mx.array | None:
    """U W' as `rows_along` gives U W, without an offset; None where it is 0, as for a whole cut."""
    if update.complete and update.alpha == 1.0:
        return None
    if update.mode is not None:
        # Norms are those of whole rows and columns.
        matrices_rows = []
        for stored in matrices(module):
            matrices_rows.append(
                update.removed(update.of_expert(stored.expert).weight(stored.whole))
            )
            mx.eval(matrices_rows[-1])
        return mx.stack(matrices_rows) if module.weight.ndim == 3 else matrices_rows[0]
    rows = rows_along(module, update.basis, update.writes_rows)
    taken = rows if update.protection is None else update.protection.taken(rows)
    if update.rows is not None:
        taken = (update.basis @ (update.rows * update.basis.T)) @ taken
    return rows - update.alpha * taken


def norm(values: mx.array) -> float:
    """The Euclidean norm of all entries."""
    return float(mx.sqrt((values.astype(mx.float32) ** 2).sum()))
