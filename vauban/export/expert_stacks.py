"""Stacks of experts that are read one expert at a time, straight from the file.

mlx reads a stored tensor whole, and all parts of a stack before it stacks them; stacks are the
largest tensors there are. A `Stack` stands in for the array in its module. Knows files and mlx-lm's
expert layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from vauban.export.origins import rehearsed
from vauban.export.tensor_files import TensorOnDisk, rechunked, stored_dtype


@dataclass(frozen=True, eq=False)
class Stack:
    """A parameter (E, ...) by the stored tensor, or the part of one, that each expert has."""

    parts: tuple[TensorOnDisk, ...]
    dtype: mx.Dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.parts), *self.parts[0].shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, expert: int) -> mx.array:
        """What one expert has, read anew each time."""
        part = self.parts[expert]
        raw = np.fromfile(part.file, np.uint8, part.end - part.start, offset=part.start)
        return mx.array(raw).view(self.dtype).reshape(part.shape)

    def array(self) -> mx.array:
        """The whole parameter."""
        return mx.stack([self[expert] for expert in range(len(self.parts))])

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, in pieces of at most 16 MB, cut where those of a stored tensor are."""
        return rechunked(piece for part in self.parts for piece in part.chunks())


def use_stacks(
    model: nn.Module, parameters: Mapping[str, mx.array], stored: Mapping[str, TensorOnDisk]
) -> dict[str, Stack]:
    """Replace expert parameters that lie unchanged in the file by stacks; return these by name."""
    names = [
        f"{path}.{key}"
        for path, module in model.named_modules()
        if isinstance(module, SwitchLinear | QuantizedSwitchLinear)
        for key in ("weight", "scales", "biases")
        if f"{path}.{key}" in parameters
    ]
    modules = dict(model.named_modules())
    stacks = {}
    for name, origins in stack_origins(model, names, stored).items():
        value = parameters[name]
        parts = expert_parts(stored, origins, value.shape[0])
        facts = (stored_dtype(value.dtype), tuple(value.shape[1:]))
        if len(parts) == value.shape[0] and {(p.dtype, p.shape) for p in parts} == {facts}:
            path, _, key = name.rpartition(".")
            stacks[name] = modules[path][key] = Stack(tuple(parts), value.dtype)
    return stacks


def stack_origins(
    model: nn.Module, names: list[str], stored: Mapping[str, TensorOnDisk]
) -> dict[str, list[str]]:
    """{parameter: its stored tensor, or that of each expert}, where at most stacking is done."""
    found = rehearsed(model, names, stored)
    return {name: list(o.names) for name, o in found.items() if not o.turned}


def expert_parts(
    stored: Mapping[str, TensorOnDisk], names: list[str], experts: int
) -> list[TensorOnDisk]:
    """Where each expert's part lies; empty where the stored tensor has another first axis."""
    if len(names) != 1:
        return [stored[name] for name in names]
    whole = stored[names[0]]
    if whole.shape[:1] != (experts,):
        return []
    size = (whole.end - whole.start) // experts
    starts = range(whole.start, whole.end, size)
    return [replace(whole, shape=whole.shape[1:], start=s, end=s + size) for s in starts]
