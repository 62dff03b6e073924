"""One writer's change as a value: which matrix, which basis, how much. Knows arrays and names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import mlx.core as mx

from vauban.edits.lowrank import NormMode, cut_matrix, remove_from_bias, share_left
from vauban.edits.null_space import DEFAULT_LIMIT, NullSpace, least_squares_rows


def is_table(layer: int, kind: str) -> bool:
    """Whether a writer is a token or position table: all before the blocks but plain matrices."""
    return layer < 0 and kind in ("embedding", "other")


@dataclass(frozen=True, eq=False)
class Protection:
    """What one matrix must keep doing: a null space, or one per expert (None: never routed to).

    mode "project" takes P r of the removed row r; "least_squares" the row inside the null space
    that removes the direction best from `targets`, inputs that carry it (m, in), per expert too,
    and is at most `limit` times as long as r.
    """

    spaces: tuple[NullSpace | None, ...]
    mode: Literal["project", "least_squares"] = "project"
    targets: tuple[mx.array | None, ...] = ()
    limit: float = DEFAULT_LIMIT

    def taken(self, removed: mx.array) -> mx.array:
        """(k, in) or (E, k, in): the part of the removed rows that may be taken out."""
        if removed.ndim == 2:
            return self._one(removed, 0)
        return mx.stack([self._one(removed[e], e) for e in range(removed.shape[0])])

    def _one(self, removed: mx.array, index: int) -> mx.array:
        space = self.spaces[index]
        if space is None:
            return removed
        target = self.targets[index] if self.targets else None
        if self.mode == "least_squares" and target is not None:
            return least_squares_rows(removed, space, target, limit=self.limit)
        return space.project(removed)


@dataclass(frozen=True, eq=False)
class Update:
    """W <- W - α L R with L = U^T (k columns) and R = U W, for one writer.

    `basis` U (k, out) holds the gain of a post-norm. `rows` (out, 1) restricts L to some rows
    (sparse surgery), `protection` restricts R to the null space of preserved inputs. `offset`
    (out,) is added to every row of a table, or to the matrix's bias (`affine_cut`). `bias` says
    whether the module's bias is cut, `bias_left` that there is one which is left alone and still
    writes the direction.
    """

    path: str
    layer: int
    kind: str
    basis: mx.array
    alpha: float
    mode: NormMode
    bias: bool
    rows: mx.array | None = None
    protection: Protection | None = None
    offset: mx.array | None = None
    bias_left: bool = False

    @property
    def is_embedding(self) -> bool:
        """The token embedding, whose matrix may be the head's as well."""
        return self.kind == "embedding"

    @property
    def writes_rows(self) -> bool:
        """Token and position tables write their rows; matrices write their outputs."""
        return is_table(self.layer, self.kind)

    @property
    def acts_on_outputs(self) -> bool:
        """Whether the same change can be made to the module's output, without its weights.

        A bias that is left alone is in the output as well, and would be cut there.
        """
        inside = self.mode is not None or self.rows is not None or self.protection is not None
        return not inside and not self.bias_left

    def weight(self, weight: mx.array) -> mx.array:
        """The edited matrix in float32; a table's rows are the vectors it writes."""
        if self.writes_rows:
            cut = cut_matrix(weight.T, self.basis, self.alpha, self.mode).T
            return cut if self.offset is None else cut + self.offset
        if self.rows is None and self.protection is None:
            return cut_matrix(weight, self.basis, self.alpha, self.mode)
        left = self.basis.T if self.rows is None else self.rows * self.basis.T
        return weight.astype(mx.float32) - self.alpha * (left @ self.taken(weight))

    def of_expert(self, expert: int | None) -> Update:
        """The update of one expert's matrix, with its own protection. None: no experts."""
        p = self.protection
        if expert is None or p is None:
            return self
        targets = (p.targets[expert],) if p.targets else ()
        return replace(self, protection=replace(p, spaces=(p.spaces[expert],), targets=targets))

    def new_bias(self, bias: mx.array) -> mx.array:
        """The edited bias in its own dtype."""
        cut = remove_from_bias(bias, self.basis, self.alpha)
        if self.offset is not None:
            cut = cut + self.offset
        return cut.astype(bias.dtype)

    def removed(self, weight: mx.array) -> mx.array:
        """R = U W (..., k, in) in float32, the rows that a full cut takes out."""
        w = weight.astype(mx.float32)
        return self.basis @ (w.T if self.writes_rows else w)

    def taken(self, weight: mx.array) -> mx.array:
        """What is taken out of R: all of it, or what the protection lets through."""
        removed = self.removed(weight)
        return removed if self.protection is None else self.protection.taken(removed)

    def share_left(self, after: mx.array, before: mx.array) -> float:
        """‖U W'‖/‖U W‖, without what an offset puts there."""
        if self.writes_rows and self.offset is not None:
            after = after.astype(mx.float32) - self.offset
        if self.writes_rows:
            after, before = after.T, before.T
        return share_left(after, before, self.basis)

    @property
    def whole(self) -> bool:
        """Whether nothing at all is to be left along U."""
        return self.complete and self.alpha == 1.0 and self.offset is None

    @property
    def complete(self) -> bool:
        """Whether a cut at α 1 is meant to leave nothing."""
        return self.rows is None and self.protection is None and self.mode != "row"
