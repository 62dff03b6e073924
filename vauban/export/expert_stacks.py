"""Stacks of experts that are read one expert at a time, straight from the file.

mlx reads a stored tensor whole, and all parts of a stack before it stacks them; stacks are the
largest tensors there are. A `Stack` stands in for the array in its module. Knows files and mlx-lm's
expert layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from vauban.export.tensor_files import TensorOnDisk, rechunked, stored_dtype

# Both sizes are even, as fused projections are split in halves, and differ, so that a transpose
# shows.
_SMALL = (4, 6)


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
        parts = _parts(stored, origins, value.shape[0])
        facts = (stored_dtype(value.dtype), tuple(value.shape[1:]))
        if len(parts) == value.shape[0] and {(p.dtype, p.shape) for p in parts} == {facts}:
            path, _, key = name.rpartition(".")
            stacks[name] = modules[path][key] = Stack(tuple(parts), value.dtype)
    return stacks


def stack_origins(
    model: nn.Module, names: list[str], stored: Mapping[str, TensorOnDisk]
) -> dict[str, list[str]]:
    """{parameter: its stored tensor, or that of each expert}, where at most stacking is done.

    Found by a rehearsal: mlx-lm's own conversion (`sanitize`) runs on small random tensors under
    the stored names, and each outcome is looked up among what went in. A parameter that was turned,
    split or scaled on the way equals none of it and is left out.
    """
    if not names:
        return {}
    random = np.random.default_rng(0)
    small = {
        name: mx.array(random.normal(size=_small_shape(tensor)).astype(np.float32))
        for name, tensor in stored.items()
        if _of_experts(name, tensor)
    }
    rehearsed = {name: small.get(name, mx.zeros(t.shape)) for name, t in stored.items()}
    origin = {_digest(value): name for name, value in small.items()}
    sanitize = getattr(model, "sanitize", dict)
    try:
        converted = sanitize(rehearsed)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        # A conversion that needs the true shapes: such stacks are read whole, which costs memory.
        return {}
    origins = {}
    for name in names:
        value = converted.get(name)
        if value is None or tuple(value.shape[-2:]) != _SMALL:
            continue
        if _digest(value) in origin:
            origins[name] = [origin[_digest(value)]]
        elif all(_digest(part) in origin for part in value):
            origins[name] = [origin[_digest(part)] for part in value]
    return origins


def _of_experts(name: str, tensor: TensorOnDisk) -> bool:
    """Whether a stored tensor may belong to experts: several in one, or a second number in it."""
    return len(tensor.shape) == 3 or len(re.findall(r"\.\d+\.", f".{name}.")) > 1


def _small_shape(tensor: TensorOnDisk) -> tuple[int, ...]:
    """As many axes as the tensor has; the first of three, the experts, keeps its size."""
    return *tensor.shape[:-2], *_SMALL[max(0, 2 - len(tensor.shape)) :]


def _digest(value: mx.array) -> bytes:
    array = np.array(value)
    return str(array.shape).encode() + array.tobytes()


def _parts(
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
