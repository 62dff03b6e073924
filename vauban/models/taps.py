"""Record and change the residual stream while a model runs its own forward pass.

Blocks, the modules that put out their terms, and modules of a weight edit are wrapped for the time
of a `with` block. Knows modules and interventions; knows no tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from vauban.errors import ArchitectureError, InputError
from vauban.interventions import (
    Change,
    Intervention,
    ModuleChange,
    ModuleWeights,
    check_width,
    composed,
)
from vauban.models.anatomy import anatomy
from vauban.models.families import BLOCKS_NOT_CALLED, family_of
from vauban.models.notes import notes
from vauban.models.swap import Swap, around, swapped
from vauban.models.writers import branches, unpacked_shape

Steps = dict[bool, Change | None]
"""What is done to a term while a prompt is read (True) and while tokens are decoded (False)."""

Place = int | str
"""Which argument of a block holds the stream: its number, or its name for a named one."""


def put(args: Sequence[Any], kwargs: dict[str, Any], place: Place, h: Any) -> tuple[Any, Any]:
    """A call's arguments with `h` inserted where the stream belongs."""
    if isinstance(place, str):
        return tuple(args), {**kwargs, place: h}
    return (*args[:place], h, *args[place:]), kwargs


def take(args: tuple[Any, ...], kwargs: dict[str, Any], place: Place) -> tuple[Any, Any, Any]:
    """The stream, and a call's arguments without it."""
    if isinstance(place, str):
        return kwargs[place], args, {k: v for k, v in kwargs.items() if k != place}
    return args[place], args[:place] + args[place + 1 :], kwargs


@dataclass
class Stream:
    """What a tap sees of one forward pass.

    `prefill` tells the interventions whether a prompt is being read or tokens are decoded. With
    `recording` the blocks' stream inputs, arguments and outputs are kept by block; `extras` counts
    what each block returned after the stream, `rounds` how often the trunk went over its blocks.
    Only the last round is kept.
    """

    recording: bool = False
    prefill: bool = True
    inputs: dict[int, mx.array] = field(default_factory=dict)
    outputs: dict[int, mx.array] = field(default_factory=dict)
    arguments: dict[int, dict[int | str, Any]] = field(default_factory=dict)
    extras: dict[int, int] = field(default_factory=dict)
    rounds: int = 0

    @property
    def residuals(self) -> list[mx.array]:
        """Inputs of the blocks in order, then the last output; [] when nothing was recorded."""
        if not self.outputs:
            return []
        return [*(self.inputs[i] for i in sorted(self.inputs)), self.outputs[max(self.outputs)]]


@contextmanager
def tapped(
    model: nn.Module,
    interventions: Sequence[Intervention] = (),
    *,
    stream: Stream | None = None,
    blocks: bool = True,
) -> Iterator[Stream]:
    """Run the model's own forward pass inside the block with `interventions` in force.

    They have to be started (`interventions.started`). With `stream.recording` every block input
    and the last block's output are kept in the stream, after the interventions at that site.
    `blocks=False` leaves the blocks alone (the explicit loop handles their inputs itself).
    """
    parts = anatomy(model)
    total = parts.n_layers
    stream = stream or Stream()
    check_width(interventions, parts.d_model)
    swaps = _substituted(model, interventions) + _module_changes(model, interventions, stream)
    for branch, steps in _branch_changes(model, interventions, total):
        swaps.append(_output_changed(branch.module, steps, stream, branch.multiplier))
    touched = any(
        any(stream_changes(interventions, "block_input", layer, total).values())
        for layer in range(total + 1)
    )
    if blocks and touched and family_of(model) in BLOCKS_NOT_CALLED:
        raise ArchitectureError(
            f"{type(model).__module__} never calls its blocks as modules, so the stream cannot "
            "be changed while it generates; use a run-time cut (EditPlan.virtual())"
        )
    if blocks and (stream.recording or touched):
        swaps += _block_taps(parts.layers, interventions, stream, notes(model).place)
    with swapped(swaps):
        yield stream


def stream_changes(
    interventions: Sequence[Intervention], site: str, layer: int, n_layers: int
) -> Steps:
    """The composed change at one site."""
    return {
        prefill: composed([i.change(site, layer, n_layers, prefill) for i in interventions])
        for prefill in (True, False)
    }


def _output_changed(module: nn.Module, steps: Steps, stream: Stream, factor: float = 1.0) -> Swap:
    """The swap after which factor · module(...) is changed."""

    def call(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        step = steps[stream.prefill]
        if step is None:
            return out
        if isinstance(out, tuple):
            head, *rest = out
            return (step(head * factor) / factor, *rest)
        return step(out * factor) / factor if factor != 1.0 else step(out)

    return around(module, call)


def _branch_changes(
    model: nn.Module, interventions: Sequence[Intervention], total: int
) -> list[tuple[Any, Steps]]:
    """The terms of blocks that are changed; they are only looked for where one is."""
    needed = any(
        any(stream_changes(interventions, site, layer, total).values())
        for site in ("attention_output", "mlp_output")
        for layer in range(total)
    )
    terms = branches(model) if needed else []
    changes = [(b, stream_changes(interventions, b.site, b.layer, total)) for b in terms]
    return [(branch, steps) for branch, steps in changes if any(steps.values())]


def _block_taps(
    layers: Sequence[nn.Module], interventions: Sequence[Intervention], stream: Stream, place: Place
) -> list[Swap]:
    """The swaps after which the blocks' stream is changed and, where `stream` records, kept."""
    total = len(layers)
    last = stream_changes(interventions, "block_input", total, total)

    def call(index: int, steps: Steps, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        step = steps[stream.prefill]
        if step is not None:
            h, args, kwargs = take(args, kwargs, place)
            args, kwargs = put(args, kwargs, place, step(h))
        if stream.recording:
            seen: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
            stream.arguments[index] = seen
            if place in seen:
                stream.inputs[index] = seen[place]
            stream.rounds += index == 0
        out = inner(*args, **kwargs)
        head, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, ())
        if index == total - 1:
            step = last[stream.prefill]
            head = step(head) if step is not None else head
        if stream.recording:
            stream.outputs[index] = head
            stream.extras[index] = len(rest)
        return (head, *rest) if isinstance(out, tuple) else head

    steps = [stream_changes(interventions, "block_input", i, total) for i in range(total)]
    return [around(layer, partial(call, i, steps[i])) for i, layer in enumerate(layers)]


def _module_changes(
    model: nn.Module, interventions: Sequence[Intervention], stream: Stream
) -> list[Swap]:
    """The swaps of every `ModuleChange` (the run-time cut), composed per module."""
    cuts = [i for i in interventions if isinstance(i, ModuleChange)]
    swaps: list[Swap] = []
    for path, module in _named(model, {path for cut in cuts for path in cut.paths}):
        step = composed([cut.output_change(path) for cut in cuts])
        methods = dict(_output_changed(module, {True: step, False: step}, stream)[1])
        head = composed([cut.head_change(path) for cut in cuts])
        if head is not None:
            # A tied head reads the changed stream.
            methods |= around(module, lambda inner, h, f=head: inner(f(h)), "as_linear")[1]
        swaps.append((module, methods))
    return swaps


def _substituted(model: nn.Module, interventions: Sequence[Intervention]) -> list[Swap]:
    """The swaps that let modules run with the matrices of every `ModuleWeights`."""
    changes = {
        path: change
        for change in interventions
        if isinstance(change, ModuleWeights)
        for path in change.weights
    }
    swaps: list[Swap] = []
    for path, module in _named(model, set(changes)):
        weight, bias = changes[path].weights[path], changes[path].biases.get(path)
        shape, expected = tuple(weight.shape), unpacked_shape(module)
        if shape != expected:
            raise InputError(f"the matrix for {path} has shape {shape}; expected {expected}")
        twin = _twin(module, weight, bias)
        methods: dict[str, Any] = {"__call__": lambda self, *a, _twin=twin, **k: _twin(*a, **k)}
        if path in changes[path].tied:
            methods["as_linear"] = lambda self, h, _twin=twin: _twin.as_linear(h)
        swaps.append((module, methods))
    return swaps


def _named(model: nn.Module, paths: set[str]) -> list[tuple[str, nn.Module]]:
    """The modules at `paths`; InputError for a path that the model does not have."""
    if not paths:
        return []
    modules = dict(model.named_modules())
    missing = sorted(paths - modules.keys())
    if missing:
        raise InputError(f"the model has no module {missing[0]}; was this plan made for it?")
    return [(path, module) for path, module in modules.items() if path in paths]


def _twin(module: nn.Module, weight: mx.array, bias: mx.array | None) -> nn.Module:
    """A float module of the same kind with `weight`; the module's own bias where none is given."""
    scales = module.get("scales")
    dtype = (module.weight if scales is None else scales).dtype
    if not mx.issubdtype(dtype, mx.floating):
        dtype = mx.float32
    if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
        twin: nn.Module = nn.Embedding(1, 1)
    elif isinstance(module, SwitchLinear | QuantizedSwitchLinear):
        twin = SwitchLinear(1, 1, 1, bias=False)
    else:
        twin = nn.Linear(1, 1, bias=False)
    twin.weight = weight.astype(dtype)
    bias = module.get("bias") if bias is None else bias
    if bias is not None:
        twin.bias = bias.astype(dtype)
    return twin
