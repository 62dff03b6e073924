"""Stacks of experts that are read one expert at a time, straight from the file.

mlx reads a stored tensor whole, and all parts of a stack before it stacks them; stacks are the
largest tensors there are. A `Stack` stands in for the array in its module. Knows files and mlx-lm's
expert layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from vauban.export.tensors import Stored, recut, stored_dtype


@dataclass(frozen=True, eq=False)
class Stack:
    """A parameter (E, ...) by the stored tensor, or the part of one, that each expert has."""

    parts: tuple[Stored, ...]
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
        return recut(piece for part in self.parts for piece in part.chunks())


def use_stacks(
    model: nn.Module,
    parameters: Mapping[str, mx.array],
    stored: Mapping[str, Stored],
    origin: Callable[[mx.array], list[str] | None],
) -> dict[str, Stack]:
    """Put stacks in the place of all expert parameters that lie in the file as they are; by name.

    `origin`: the stored tensors that a parameter is, unchanged (`noted_origins`). Names and shapes
    would not do: a square matrix that mlx-lm turns has those it had.
    """
    found = {}
    for path, module in model.named_modules():
        if not isinstance(module, SwitchLinear | QuantizedSwitchLinear):
            continue
        for key in ("weight", "scales", "biases"):
            name = f"{path}.{key}"
            value = parameters.get(name)
            names = None if value is None else origin(value)
            if value is None or names is None:
                continue
            parts = _parts(stored, names, value.shape[0])
            facts = (stored_dtype(value.dtype), tuple(value.shape[1:]))
            if len(parts) == value.shape[0] and {(p.dtype, p.shape) for p in parts} == {facts}:
                found[name] = module[key] = Stack(tuple(parts), value.dtype)
    return found


def _parts(stored: Mapping[str, Stored], names: list[str], experts: int) -> list[Stored]:
    """Where each expert's part lies; empty when that is not known."""
    if any(name not in stored for name in names):
        return []
    if len(names) != 1:
        return [stored[name] for name in names]
    whole = stored[names[0]]
    if whole.shape[:1] != (experts,):
        return []
    size = (whole.end - whole.start) // experts
    starts = range(whole.start, whole.end, size)
    return [replace(whole, shape=whole.shape[1:], start=s, end=s + size) for s in starts]


@contextmanager
def noted_origins() -> Iterator[Callable[[mx.array], list[str] | None]]:
    """While mlx-lm loads a folder: which stored tensor an array is, or those it was stacked of.

    mlx tells no array's origin, so its `load` and `stack` are listened to meanwhile.
    """
    # The arrays are held so that none is mistaken for one that came after it.
    loaded: dict[int, tuple[str, mx.array]] = {}
    stacks: dict[int, tuple[list[str], mx.array]] = {}
    load, stack = mx.load, mx.stack

    def noting_load(*arguments: Any, **more: Any) -> Any:
        found = load(*arguments, **more)
        if isinstance(found, dict):
            loaded.update({id(value): (name, value) for name, value in found.items()})
        return found

    def noting_stack(arrays: list[mx.array], axis: int = 0, **more: Any) -> mx.array:
        made = stack(arrays, axis, **more)
        if axis == 0 and all(id(part) in loaded for part in arrays):
            stacks[id(made)] = [loaded[id(part)][0] for part in arrays], made
        return made

    def origin(value: mx.array) -> list[str] | None:
        if id(value) in loaded:
            return [loaded[id(value)][0]]
        return stacks[id(value)][0] if id(value) in stacks else None

    mx.load, mx.stack = noting_load, noting_stack  # type: ignore[assignment]
    try:
        yield origin
    finally:
        mx.load, mx.stack = load, stack
