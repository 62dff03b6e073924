"""Let modules run with another matrix for the time of a `with` block. Knows modules and arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from vauban.errors import InputError
from vauban.interventions import Intervention, ModuleWeights
from vauban.models.swap import Swap
from vauban.models.writers import unpacked_shape


def substitutions(model: nn.Module, interventions: Sequence[Intervention]) -> list[Swap]:
    """The swaps that let modules run with the matrices of every `ModuleWeights`."""
    swaps: list[Swap] = []
    wanted = {
        path: (weight, change.biases.get(path), path in change.tied)
        for change in interventions
        if isinstance(change, ModuleWeights)
        for path, weight in change.weights.items()
    }
    for path, module in model.named_modules():
        if path not in wanted:
            continue
        weight, bias, tied = wanted.pop(path)
        expected = unpacked_shape(module)
        if tuple(weight.shape) != expected:
            raise InputError(
                f"the matrix for {path} has shape {tuple(weight.shape)}; expected {expected}"
            )
        twin = _twin(module, weight, bias)
        methods: dict[str, Any] = {"__call__": lambda self, *a, _twin=twin, **k: _twin(*a, **k)}
        if tied:
            methods["as_linear"] = lambda self, h, _twin=twin: _twin.as_linear(h)
        swaps.append((module, methods))
    if wanted:
        raise InputError(f"the model has no module {sorted(wanted)[0]}; was this plan made for it?")
    return swaps


def _twin(module: nn.Module, weight: mx.array, bias: mx.array | None) -> nn.Module:
    """A float module of the same kind with `weight`; its own bias where none is given."""
    kind = getattr(module, "scales", None)
    dtype = kind.dtype if isinstance(kind, mx.array) else module.weight.dtype
    if not mx.issubdtype(dtype, mx.floating):
        dtype = mx.float32
    if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
        twin: nn.Module = nn.Embedding(1, 1)
    elif isinstance(module, SwitchLinear | QuantizedSwitchLinear):
        twin = SwitchLinear(1, 1, 1, bias=False)
    else:
        twin = nn.Linear(1, 1, bias=False)
    twin.weight = weight.astype(dtype)
    own = bias if bias is not None else module.get("bias")
    if own is not None:
        twin.bias = own.astype(dtype)
    return twin
