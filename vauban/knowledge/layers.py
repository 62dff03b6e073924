"""The matrices that hold facts: the last one of each block's MLP. Knows modules; computes nothing.

A fact's value is written to the stream as W k, so a block can be edited where that product reaches
the stream as it is: one dense matrix, nothing but a fixed factor behind it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vauban._arrays import as_numpy
from vauban.edits.modules import module_weight
from vauban.errors import ArchitectureError, InputError, shown
from vauban.models import residual_writers
from vauban.models.anatomy import multiplier


@dataclass(frozen=True)
class EditedModule:
    """The matrix at `path`: keys are `width` wide, the stream gets `multiplier` times W k."""

    layer: int
    path: str
    width: int
    multiplier: float
    model: nn.Module

    @property
    def module(self) -> nn.Module:
        """The module that stands at the path now; edits may have put another one there."""
        return dict(self.model.named_modules())[self.path]

    def weight(self) -> mx.array:
        """W (d1, d0) in float32."""
        return module_weight(self.module).astype(mx.float32)

    def digest(self) -> str:
        """A hash of the matrix, to tell one model's statistics from another's."""
        return hashlib.sha256(as_numpy(self.weight()).tobytes()).hexdigest()[:16]


def edited_modules(model: nn.Module, layers: Any) -> dict[int, EditedModule]:
    """The matrices of `layers`, by block in ascending order.

    Raises InputError for blocks that do not exist, ArchitectureError, by name, for a block whose
    MLP is routed or ends in a norm: there W k is not what reaches the stream.
    """
    total = len(model.layers)
    listed = [layers] if isinstance(layers, int) else layers
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
        raise InputError(f"layers is {shown(layers)}; expected block indices")
    wrong = [layer for layer in listed if not isinstance(layer, int) or not 0 <= layer < total]
    if wrong:
        raise InputError(
            f"block {wrong[0]!r} does not exist; the model has blocks 0 to {total - 1}"
        )
    if list(listed) != sorted(set(listed)):
        raise InputError(f"layers are {list(listed)}; expected ascending blocks, each once")
    writers = residual_writers(model)
    modules = {}
    for layer in listed:
        parts = [w for w in writers if w.layer == layer and w.kind in _MLP]
        if [w.kind for w in parts] != ["mlp"]:
            kinds = sorted({w.kind for w in parts}) or ["no MLP"]
            raise ArchitectureError(
                f"block {layer} cannot hold a fact: its MLP is {', '.join(kinds)}, and an edit "
                "needs one dense matrix; choose other layers"
            )
        if parts[0].gain is not None:
            raise ArchitectureError(
                f"block {layer} cannot hold a fact: a norm stands between {parts[0].path} and the "
                "stream, so no update adds a given vector"
            )
        modules[layer] = EditedModule(
            layer, parts[0].path, int(parts[0].shape[1]), multiplier(model.layers[layer]), model
        )
    return modules


_MLP = ("mlp", "expert", "shared_expert")
