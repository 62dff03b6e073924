"""How much the model's own predictions move with what a module puts out: Fisher information.

Knows modules and arrays; judges nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vauban.interventions import Intervention
from vauban.models.forward import forward
from vauban.models.swap import around, swapped


def output_gradients(
    model: nn.Module,
    paths: Iterable[str],
    tokens: mx.array,
    *,
    interventions: Iterable[Intervention] = (),
    key: mx.array,
) -> dict[str, mx.array]:
    """For each path ∇ log p(y) (B·T, d) with respect to that module's output at every position.

    tokens (B, T) without padding; y is drawn from the model's own next-token distribution with
    `key`, so that E[g gᵀ] is the Fisher information of the output (not the empirical one, which
    takes y from data). The module is called once per forward pass. Raises what mlx raises where
    an operation of the model has no gradient (ValueError or RuntimeError).
    """
    interventions = tuple(interventions)
    modules = dict(model.named_modules())
    wanted = {path: modules[path] for path in paths}

    def logits() -> mx.array:
        out = forward(model, tokens, positions=None, interventions=interventions).logits
        assert out is not None
        return out.astype(mx.float32)

    shapes: dict[str, mx.array] = {}

    def note(path: str, y: mx.array) -> mx.array:
        shapes[path] = mx.zeros(y.shape, mx.float32)
        return y

    with _outputs(wanted, note):
        drawn = mx.random.categorical(logits(), key=key)

    def likelihood(deltas: dict[str, mx.array]) -> mx.array:
        def add(path: str, y: mx.array) -> mx.array:
            return y + deltas[path].astype(y.dtype)

        with _outputs(wanted, add):
            found = logits()
        chosen = mx.take_along_axis(found, drawn[..., None], -1)[..., 0]
        return (chosen - mx.logsumexp(found, -1)).sum()

    gradients = mx.grad(likelihood)(shapes)
    mx.eval(gradients)
    return {path: g.reshape(-1, g.shape[-1]) for path, g in gradients.items()}


def _outputs(
    modules: Mapping[str, nn.Module], change: Callable[[str, mx.array], mx.array]
) -> AbstractContextManager[None]:
    """Inside the block what each module puts out is `change(path, y)`."""

    def call(path: str, inner: Any, *args: Any, **kwargs: Any) -> mx.array:
        return change(path, inner(*args, **kwargs))

    return swapped(around(module, partial(call, path)) for path, module in modules.items())
