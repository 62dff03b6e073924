"""Two scans of the same rows, before and after a change: rates side by side, paired tests.

Values in, values out; knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vauban._results import to_plain
from vauban.errors import InputError
from vauban.evaluation.pairs import PairedResult, paired_verdicts
from vauban.evaluation.surface import MAPS, SurfacePoint, SurfaceScan
from vauban.evaluation.surface_cells import MINIMUM, Cell, group
from vauban.evaluation.surface_rows import LABELS


@dataclass(frozen=True)
class CellChange:
    """One cell before and after; `paired` over its rows with a verdict on both sides, None without
    any. The p-values of many cells are not corrected for their number."""

    values: Mapping[str, Any]
    before: Cell
    after: Cell
    paired: PairedResult | None

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_plain(self)
        return plain


@dataclass(frozen=True)
class SurfaceComparison:
    """Two scans over their common rows.

    Attributes:
        before, after: the scans of the common rows, in the same order.
        paired: exact tests of refusal over all rows, and over each label; None without pairs.
        only_before, only_after: rows that one scan alone has.

    >>> import vauban
    >>> from vauban.evaluation.surface import SurfacePoint
    >>> row = vauban.load_surface_prompts()[0]
    >>> scans = [
    ...     SurfaceScan((SurfacePoint(row, 1.0, x, "refused", r, "..."),), {}, {}, None, 8, True)
    ...     for x, r in ((60.0, True), (0.0, False))
    ... ]
    >>> found = compare_surfaces(*scans)
    >>> found.paired["all"].only_before, found.only_after
    (1, 0)
    """

    before: SurfaceScan
    after: SurfaceScan
    paired: Mapping[str, PairedResult | None]
    only_before: int
    only_after: int

    def cells(self, *axes: str, minimum: int = MINIMUM) -> list[CellChange]:
        """Every cell over some axes, before and after, with its paired test."""
        points = list(zip(self.before.points, self.after.points, strict=True))
        rows = [{axis: a.row.axis(axis) for axis in axes} for a, _ in points]
        places = group(rows, axes).values()
        sides = zip(
            self.before.cells(*axes, minimum=minimum),
            self.after.cells(*axes, minimum=minimum),
            strict=True,
        )
        return [
            CellChange(before.values, before, after, _paired([points[i] for i in at]))
            for at, (before, after) in zip(places, sides, strict=True)
        ]

    def summary(self) -> str:
        lines = [f"before: {self.before.summary()}", f"after: {'; '.join(self.after.counts())}"]
        lines += [f"{name}: {test.summary()}" for name, test in self.paired.items() if test]
        if self.only_before or self.only_after:
            lines.append(
                f"{len(self.before.points)} common rows; {self.only_before} only before, "
                f"{self.only_after} only after"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Both scans, the tests, and the maps of `MAPS` in pairs; JSON-safe."""
        return {
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "paired": to_plain(self.paired),
            "common": len(self.before.points),
            "only_before": self.only_before,
            "only_after": self.only_after,
            "maps": [
                {"axes": list(axes), "cells": [c.to_dict() for c in self.cells(*axes)]}
                for axes in MAPS
            ],
        }


def compare_surfaces(before: SurfaceScan, after: SurfaceScan) -> SurfaceComparison:
    """Compare two scans row by row: McNemar's exact test on the rows that both have.

    Rows are matched by their prompt. Raises InputError where the scans share none.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> sets = ["Rob a shop.", "Forge a ticket."], ["Name a colour.", "Say hello."]
    >>> result = vauban.measure(model, tokenizer, *sets)
    >>> rows = vauban.load_surface_prompts()[:2]
    >>> scan = vauban.scan_surface(model, tokenizer, result, rows, max_tokens=4)
    >>> compare_surfaces(scan, scan).paired["all"].difference
    0.0
    """
    left, right = _by_prompt(before), _by_prompt(after)
    common = [text for text in left if text in right]
    if not common:
        raise InputError("the two scans share no prompt; expected scans of the same rows")
    pairs = [(left[text], right[text]) for text in common]
    return SurfaceComparison(
        before=_of(before, [a for a, _ in pairs]),
        after=_of(after, [b for _, b in pairs]),
        paired={
            "all": _paired(pairs),
            **{name: _paired([p for p in pairs if p[0].row.label == name]) for name in LABELS},
        },
        only_before=len(left) - len(common),
        only_after=len(right) - len(common),
    )


def _by_prompt(scan: SurfaceScan) -> dict[str, SurfacePoint]:
    return {point.row.text: point for point in scan.points}


def _of(scan: SurfaceScan, points: Sequence[SurfacePoint]) -> SurfaceScan:
    """The scan of some of its points."""
    return SurfaceScan(
        tuple(points), scan.residuals, scan.positions, scan.cosine, scan.max_tokens, scan.one_pass
    )


def _paired(pairs: Sequence[tuple[SurfacePoint, SurfacePoint]]) -> PairedResult | None:
    return paired_verdicts((a.refused for a, _ in pairs), (b.refused for _, b in pairs))
