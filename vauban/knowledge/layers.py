"""The matrices that hold facts: the last one of each block's MLP. Knows modules.

A fact's value is written to the stream as W k, so a block can be edited where one dense matrix sees
every token: the MLP's, or the shared expert's. What stands between W k and the stream is a fixed
factor, a gate that belongs to the key, or a norm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban._arrays import as_numpy
from vauban.edits.modules import module_weight
from vauban.errors import ArchitectureError, InputError, shown
from vauban.knowledge.post_norms import before_norm as added_before_norm
from vauban.models import Writer, residual_writers
from vauban.models.anatomy import multiplier, post_norms


@dataclass(frozen=True)
class EditedModule:
    """The matrix at `path`: keys are `width` wide, the stream gets `multiplier` times W k.

    `gate` is the path of the shared expert's gate: σ(gate) W k = W (σ(gate) k), so the key is the
    matrix's input times the gate. `norm` is the path of a norm behind the MLP, `gain` its factors.
    """

    layer: int
    path: str
    width: int
    multiplier: float
    model: nn.Module
    gate: str | None = None
    norm: str | None = None
    gain: np.ndarray | None = None

    @property
    def paths(self) -> list[str]:
        """The modules whose inputs make up keys, and what the norm reads."""
        return [path for path in (self.path, self.gate, self.norm) if path is not None]

    def gates(self, inputs: Mapping[str, mx.array]) -> mx.array:
        """(n, 1) the gate's value at each token, 1 without a gate."""
        if self.gate is None:
            return mx.ones((len(inputs[self.path]), 1))
        gate = dict(self.model.named_modules())[self.gate]
        return mx.sigmoid(gate(inputs[self.gate]).astype(mx.float32))

    def keys(self, inputs: Mapping[str, mx.array]) -> mx.array:
        """(n, d0) float32 keys from the inputs of the modules at `paths`."""
        return inputs[self.path].astype(mx.float32) * self.gates(inputs)

    def written(self, output: np.ndarray, before_norm: np.ndarray | None) -> np.ndarray:
        """What the stream gets of W k = `output` (n, d1), or through the norm of `before_norm`."""
        if self.gain is None or before_norm is None:
            plain: np.ndarray = self.multiplier * output
            return plain
        length = np.linalg.norm(before_norm, axis=1, keepdims=True)
        unit = before_norm / np.where(length > 0, length, 1.0)
        normed: np.ndarray = self.multiplier * np.sqrt(len(self.gain)) * self.gain * unit
        return normed

    def residual(self, change: np.ndarray, before_norm: np.ndarray | None) -> np.ndarray:
        """What W k is to grow by, (n, d1), for the stream to grow by `change`.

        Behind a norm it is what comes nearest to that; `before_norm` (n, d1) is what it reads now.
        """
        wanted: np.ndarray = change / self.multiplier
        if self.gain is None or before_norm is None:
            return wanted
        return added_before_norm(wanted, before_norm, self.gain)

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
    MLP is routed without a shared expert, or ends in a norm that is no RMS norm.
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
    return {
        layer: _module(model, layer, [w for w in writers if w.layer == layer and w.kind in _MLP])
        for layer in listed
    }


_MLP = ("mlp", "expert", "shared_expert")


def _module(model: nn.Module, layer: int, parts: Sequence[Writer]) -> EditedModule:
    dense = [w for w in parts if w.kind == "mlp"] or [w for w in parts if w.kind != "expert"]
    if len(dense) != 1 or (dense[0].kind == "mlp" and len(parts) > 1):
        kinds = sorted({w.kind for w in parts}) or ["no MLP"]
        raise ArchitectureError(
            f"block {layer} cannot hold a fact: its MLP is {', '.join(kinds)}, and an edit needs "
            "one dense matrix, or one shared expert; choose other layers"
        )
    writer, block = dense[0], model.layers[layer]
    named = dict(model.named_modules())
    parent = writer.path.rsplit(".", 2)[0]
    gate = f"{parent}.shared_expert_gate"
    norm, gain = None, None
    if writer.gain is not None:
        norm = next(path for path, m in named.items() if m is block[post_norms(block)["mlp"]])
        gain = as_numpy(writer.gain).astype(np.float64)
        _check_norm(layer, named[norm], gain)
    return EditedModule(
        layer, writer.path, int(writer.shape[1]), multiplier(block), model,
        gate if gate in named else None, norm, gain,
    )  # fmt: skip


def _check_norm(layer: int, norm: nn.Module, gain: np.ndarray) -> None:
    """ArchitectureError unless the norm is g ∘ y √d / ‖y‖."""
    y = np.random.default_rng(0).standard_normal((2, len(gain)))
    y *= np.array([[1.0], [30.0]])
    got = as_numpy(norm(mx.array(y.astype(np.float32))).astype(mx.float32))
    wanted = gain * y * np.sqrt(len(gain)) / np.linalg.norm(y, axis=1, keepdims=True)
    if np.abs(got - wanted).max() > 1e-2 * np.abs(wanted).max():
        raise ArchitectureError(
            f"block {layer} cannot hold a fact: the norm behind its MLP, a {type(norm).__name__}, "
            "is no RMS norm"
        )
