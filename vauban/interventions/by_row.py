"""Other interventions for other rows of one batch: several changes are tried in one pass.

Rows are ordered by group. Knows interventions and arrays; knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import mlx.core as mx

from vauban._arrays import integers
from vauban.errors import ArchitectureError
from vauban.interventions.module_changes import ModuleChange
from vauban.interventions.protocol import Change, Intervention, composed


class ByRow:
    """`groups` are lists of started interventions; the first `counts[0]` rows have the first list.

    Acts at stream sites and at modules' outputs. A change of weights (`ModuleWeights`) holds for
    all rows and cannot be one of them, nor can one of routed experts, whose tokens stand sorted.
    """

    def __init__(self, groups: Sequence[Sequence[Intervention]], counts: Sequence[int]) -> None:
        self.groups, self.counts = [list(group) for group in groups], list(counts)

    @property
    def paths(self) -> frozenset[str]:
        """Every module that some group changes."""
        return frozenset().union(*(c.paths for group in self.groups for c in _at_modules(group)))

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Change | None:
        return self._by_rows(
            [
                composed([i.change(site, layer, n_layers, prefill) for i in group])
                for group in self.groups
            ]
        )

    def output_change(self, path: str) -> Change | None:
        return self._at(lambda change: change.output_change(path))

    def head_change(self, path: str) -> Change | None:
        return self._at(lambda change: change.head_change(path))

    def filter(self, rows: mx.array) -> None:
        """Only these rows go on, by index, in their order."""
        kept = integers(rows)
        ends = [0, *accumulate(self.counts)]
        for place, (start, end) in enumerate(pairwise(ends)):
            chosen = [row - start for row in kept if start <= row < end]
            self.counts[place] = len(chosen)
            for intervention in self.groups[place]:
                if hasattr(intervention, "filter"):
                    intervention.filter(mx.array(chosen, dtype=mx.int32))

    def _at(self, ask: Callable[[ModuleChange], Change | None]) -> Change | None:
        return self._by_rows([composed(list(map(ask, _at_modules(g)))) for g in self.groups])

    def _by_rows(self, steps: Sequence[Change | None]) -> Change | None:
        if not any(steps):
            return None

        def run(h: mx.array) -> mx.array:
            ends = [0, *accumulate(self.counts)]
            if h.shape[0] != ends[-1]:
                raise ArchitectureError(
                    f"a module puts out {h.shape[0]} rows for a batch of {ends[-1]}; changes that "
                    "differ by row cannot act there"
                )
            parts = [
                h[start:end] if step is None else step(h[start:end])
                for step, (start, end) in zip(steps, pairwise(ends), strict=True)
                if end > start
            ]
            return mx.concatenate(parts)

        return run


def _at_modules(group: Sequence[Intervention]) -> list[ModuleChange]:
    return [i for i in group if isinstance(i, ModuleChange)]
