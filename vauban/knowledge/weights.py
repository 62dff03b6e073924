"""The edited matrices over a sequence: as they were, as they are, and as the model stores them.

Kept in float64, because one edit is smaller than the last bits of half precision (9 % of it is lost
at ‖Δ‖/‖W‖ .003). Knows modules; knows no facts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from vauban._arrays import as_numpy
from vauban.knowledge.filters import prune
from vauban.knowledge.layers import EditedModule
from vauban.knowledge.ledger import LedgerBatch
from vauban.models import forget


class EditedWeights:
    """W (d1, d0) of each edited block.

    original  by block in float32, before the first edit
    packed    by block the packed module that stood where an edited float one stands now
    """

    def __init__(self, model: nn.Module, modules: Mapping[int, EditedModule]) -> None:
        self.model, self.modules = model, modules
        self.original = {layer: as_numpy(m.weight()) for layer, m in modules.items()}
        self.packed: dict[int, nn.Module] = {}
        self._current = {layer: w.astype(np.float64) for layer, w in self.original.items()}

    def current(self, layer: int) -> np.ndarray:
        """W as it is now, in float64."""
        return self._current[layer]

    def add(self, layer: int, delta: np.ndarray) -> None:
        """W + Δ, in the model too."""
        self._current[layer] = self._current[layer] + delta
        self._store(layer)

    def rewind(self, batches: Sequence[LedgerBatch]) -> None:
        """What these batches make of the original matrices."""
        for layer in self.modules:
            total = self.original[layer].astype(np.float64)
            for batch in batches:
                total = total + batch.delta(layer)
            self._current[layer] = total
            self._store(layer)

    def settle(self, name: str | None) -> None:
        """What the filter `name` does at the end of a sequence: W_0 + prune(W - W_0)."""
        if name != "prune":
            return
        for layer, original in self.original.items():
            change = (self._current[layer] - original).astype(np.float32)
            self._current[layer] = original + as_numpy(prune(change, original)).astype(np.float64)
            self._store(layer)

    def _store(self, layer: int) -> None:
        """Write a matrix into the model, in the module's own type, a packed one as float32."""
        edited, module = self.modules[layer], self.modules[layer].module
        weight = mx.array(self._current[layer].astype(np.float32))
        if "scales" not in module:
            module.weight = weight.astype(module.weight.dtype)
            mx.eval(module.weight)
            return
        self.packed[layer] = module
        twin = nn.Linear(1, 1, bias=False)
        twin.weight = weight
        if "bias" in module:
            twin.bias = module.bias
        twin.freeze()
        self.model.update_modules(tree_unflatten([(edited.path, twin)]))
        forget(self.model)
