"""Which stored tensors a parameter was made of: renamed, stacked or transposed ones.

mlx-lm converts a foreign checkpoint on loading (`sanitize`) and does not say how. It is told by
running that conversion again, on arrays that are not read or on small random stand-ins. Knows
models and headers; reads no weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban.export.tensor_files import Fact, TensorOnDisk, mlx_dtype

# Both sizes are even, as fused projections are split in halves, and differ, so that a transpose
# shows.
_SMALL = (4, 6)
_UNREADABLE = (ValueError, KeyError, TypeError, IndexError, AttributeError)


@dataclass(frozen=True)
class Origin:
    """The stored tensor that a parameter is, or that of each expert of a stack, in order.

    `turned`: each is stored as the transpose of its last two axes.
    """

    names: tuple[str, ...]
    turned: bool = False


def convert(model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array] | None:
    """mlx-lm's conversion of stored arrays; None where it cannot take these."""
    try:
        return dict(getattr(model, "sanitize", dict)(weights))
    except _UNREADABLE:
        return None


def parameter_origins(
    model: nn.Module, parameters: Mapping[str, mx.array], stored: Mapping[str, TensorOnDisk]
) -> dict[str, Origin]:
    """{parameter: its origin} for those that the conversion at most renames, stacks or turns."""
    origins = {
        name: Origin((origin,))
        for name, origin in _renamed(model, stored).items()
        if name in parameters and stored[origin].shape == tuple(parameters[name].shape)
    }
    for every in (False, True):
        rest = [n for n, v in parameters.items() if n not in origins and len(v.shape) > 1]
        found = rehearsed(model, rest, stored, every=every)
        origins |= {n: o for n, o in found.items() if _fits(parameters[n], o, stored)}
    return origins


def _renamed(model: nn.Module, stored: Mapping[str, TensorOnDisk]) -> dict[str, str]:
    """{parameter: stored tensor} where the very array comes out of the conversion again."""
    weights: dict[str, mx.array] = {}
    for file in {tensor.file for tensor in stored.values()}:
        # Lazy: a header is read, no tensor.
        weights |= mx.load(str(file))  # type: ignore[arg-type]
    names = {id(value): name for name, value in weights.items()}
    converted = convert(model, dict(weights)) or {}
    return {name: names[id(value)] for name, value in converted.items() if id(value) in names}


def _fits(value: mx.array, origin: Origin, stored: Mapping[str, TensorOnDisk]) -> bool:
    """Whether the stored shapes are the parameter's, in parts and turned as the origin says."""
    shape = tuple(value.shape)
    if len(origin.names) > 1:
        if len(origin.names) != shape[0]:
            return False
        shape = shape[1:]
    if origin.turned:
        shape = (*shape[:-2], shape[-1], shape[-2])
    return {stored[name].shape for name in origin.names} == {shape}


def rehearsed(
    model: nn.Module,
    names: Iterable[str],
    stored: Mapping[str, TensorOnDisk],
    *,
    every: bool = False,
) -> dict[str, Origin]:
    """Origins told by a rehearsal of the conversion on small random tensors of the stored names.

    Each outcome is looked up among what went in. A parameter that was split or scaled on the way
    equals none of it and is left out. Small are the tensors of experts; with `every` all matrices.
    """
    names = list(names)
    if not names:
        return {}
    random = np.random.default_rng(0)
    small = {
        name: mx.array(random.normal(size=_small_shape(tensor)).astype(np.float32))
        for name, tensor in stored.items()
        if _of_experts(name, tensor) or (every and len(tensor.shape) > 1)
    }
    # A conversion that needs the true shapes gives None: such arrays are read whole.
    converted = convert(model, {n: small.get(n, mx.zeros(t.shape)) for n, t in stored.items()})
    if converted is None:
        return {}
    whole = {_digest(value): name for name, value in small.items()}
    turned = {_digest(value.swapaxes(-1, -2)): n for n, value in small.items() if value.ndim > 1}
    origins = {}
    for name in names:
        value = converted.get(name)
        if value is None or value.ndim < 2 or set(value.shape[-2:]) != set(_SMALL):
            continue
        for known, is_turned in ((whole, False), (turned, True)):
            if _digest(value) in known:
                origins[name] = Origin((known[_digest(value)],), is_turned)
            elif value.ndim > 2 and all(_digest(part) in known for part in value):
                origins[name] = Origin(tuple(known[_digest(part)] for part in value), is_turned)
            else:
                continue
            break
    return origins


def converted_shapes(model: nn.Module, facts: Iterable[Fact]) -> dict[str, tuple[int, ...]] | None:
    """{parameter: shape} that mlx-lm makes of tensors of these names, types and shapes."""
    zeros = {name: mx.zeros(shape, mlx_dtype(dtype)) for name, dtype, shape in facts}
    converted = convert(model, zeros)
    return None if converted is None else {n: tuple(v.shape) for n, v in converted.items()}


def _of_experts(name: str, tensor: TensorOnDisk) -> bool:
    """Whether a stored tensor may belong to experts: several in one, or a second number in it."""
    return len(tensor.shape) == 3 or len(re.findall(r"\.\d+\.", f".{name}.")) > 1


def _small_shape(tensor: TensorOnDisk) -> tuple[int, ...]:
    """As many axes as the tensor has; the first of three, the experts, keeps its size."""
    return *tensor.shape[:-2], *_SMALL[max(0, 2 - len(tensor.shape)) :]


def _digest(value: mx.array) -> bytes:
    array: Any = np.array(value)
    return str(array.shape).encode() + array.tobytes()
