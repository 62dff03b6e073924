"""One writer's change as a value: which matrix, which basis, how much. Knows arrays and names."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from vauban.edits.lowrank import NormMode, cut_matrix, share_left


@dataclass(frozen=True, eq=False)
class Update:
    """W <- W - α U^T (U W) of one writer; `basis` (k, out) holds the gain of a post-norm."""

    path: str
    layer: int
    kind: str
    basis: mx.array
    alpha: float
    mode: NormMode
    bias: bool

    @property
    def is_embedding(self) -> bool:
        """The token embedding, whose matrix may be the head's as well."""
        return self.kind == "embedding"

    @property
    def writes_rows(self) -> bool:
        """Token and position tables write their rows; matrices write their outputs."""
        return self.layer < 0

    def weight(self, weight: mx.array) -> mx.array:
        """The edited matrix in float32; a table's rows are the vectors it writes."""
        if self.writes_rows:
            return cut_matrix(weight.T, self.basis, self.alpha, self.mode).T
        return cut_matrix(weight, self.basis, self.alpha, self.mode)

    def removed(self, weight: mx.array) -> mx.array:
        """U W (..., k, in) in float32, the rows that the cut takes out."""
        w = weight.astype(mx.float32)
        return self.basis @ (w.T if self.writes_rows else w)

    def share_left(self, after: mx.array, before: mx.array) -> float:
        """‖U W'‖/‖U W‖."""
        if self.writes_rows:
            after, before = after.T, before.T
        return share_left(after, before, self.basis)
