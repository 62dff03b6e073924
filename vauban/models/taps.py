"""Record and change the residual stream while a model runs its own forward pass.

Knows modules and interventions; knows no tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vauban.errors import ArchitectureError, InputError
from vauban.interventions import Intervention, ModuleOutputs, check_width
from vauban.models.anatomy import anatomy
from vauban.models.families import BLOCKS_NOT_CALLED, family_of
from vauban.models.notes import notes
from vauban.models.substitute import substitutions
from vauban.models.swap import Swap, around, swapped
from vauban.models.walk import Place, put, take
from vauban.models.writers import branches

Change = Callable[[mx.array], mx.array]


@dataclass
class Stream:
    """What a tap sees: `residuals[r]` is the input of block r, `residuals[L]` the last output.

    `prefill` tells the interventions whether a prompt is being read or tokens are decoded;
    `extras` counts what each block returned after the stream. A trunk that loops over its blocks
    more than once leaves its last round.
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


def compose(changes: Sequence[Change | None]) -> Change | None:
    """One function that applies the given ones in order; None when there is nothing to do."""
    steps = [change for change in changes if change is not None]
    if not steps:
        return None

    def run(h: mx.array) -> mx.array:
        for step in steps:
            h = step(h)
        return h

    return run


def stream_changes(
    interventions: Sequence[Intervention], site: str, layer: int, n_layers: int
) -> dict[bool, Change | None]:
    """The composed change at one site, for prefill (True) and for decoding (False)."""
    return {
        prefill: compose([i.change(site, layer, n_layers, prefill) for i in interventions])
        for prefill in (True, False)
    }


def _output_changed(
    module: nn.Module, steps: dict[bool, Change | None], stream: Stream, factor: float = 1.0
) -> Swap:
    """factor · module(...) changed as `steps` has it for prefill or decoding."""

    def call(inner: Any, *args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        step = steps[stream.prefill]
        if step is None:
            return out
        if isinstance(out, tuple):
            head, *rest = out
            return (step(head * factor) / factor, *rest)
        return step(out * factor) / factor if factor != 1.0 else step(out)

    return around(module, call)


@contextmanager
def tapped(
    model: nn.Module,
    interventions: Sequence[Intervention] = (),
    *,
    stream: Stream | None = None,
    blocks: bool = True,
) -> Iterator[Stream]:
    """Run the model's own forward inside the block with `interventions` in force.

    With `stream.recording` every block input and the last block's output are appended to
    `stream.residuals`, after the interventions at that site. `blocks=False` leaves the blocks
    alone (the explicit loop handles their inputs itself).
    """
    parts = anatomy(model)
    total = parts.n_layers
    stream = stream or Stream()
    check_width(interventions, parts.d_model)
    swaps = substitutions(model, interventions) + _module_changes(model, interventions, stream)
    for branch, steps in _branch_changes(model, interventions, total):
        swaps.append(_output_changed(branch.module, steps, stream, branch.multiplier))
    touched = _touches_blocks(interventions, total)
    if blocks and touched and family_of(model) in BLOCKS_NOT_CALLED:
        raise ArchitectureError(
            f"{type(model).__module__} never calls its blocks as modules, so the stream cannot "
            "be changed while it generates; use a run-time cut (EditPlan.virtual())"
        )
    if blocks and (stream.recording or touched):
        swaps += _block_taps(parts.layers, interventions, stream, notes(model).place)
    with swapped(swaps):
        yield stream


def _module_changes(
    model: nn.Module, interventions: Sequence[Intervention], stream: Stream
) -> list[Swap]:
    """Changes at module outputs (the run-time cut), composed per module."""
    cuts = [i for i in interventions if isinstance(i, ModuleOutputs)]
    wanted = {path for cut in cuts for path in (*cut.factors, *cut.heads)}
    swaps: list[Swap] = []
    for path, module in model.named_modules():
        if path not in wanted:
            continue
        wanted.discard(path)
        step = compose([cut.output_change(path) for cut in cuts])
        methods = dict(_output_changed(module, {True: step, False: step}, stream)[1])
        shared = compose([cut.head_change(path) for cut in cuts])
        if shared is not None:
            methods |= _head_changed(module, shared)[1]
        swaps.append((module, methods))
    if wanted:
        raise InputError(f"the model has no module {sorted(wanted)[0]}; was this plan made for it?")
    return swaps


def _head_changed(embedding: nn.Module, step: Change) -> Swap:
    """A tied head reads `step(h)`."""
    return around(embedding, lambda inner, h: inner(step(h)), "as_linear")


def _branch_changes(
    model: nn.Module, interventions: Sequence[Intervention], total: int
) -> list[tuple[Any, dict[bool, Change | None]]]:
    needed = any(
        i.change(site, layer, total, True) or i.change(site, layer, total, False)
        for i in interventions
        for site in ("attention_output", "mlp_output")
        for layer in range(total)
    )
    if not needed:
        return []
    found = []
    for branch in branches(model):
        steps = stream_changes(interventions, branch.site, branch.layer, total)
        if any(steps.values()):
            found.append((branch, steps))
    return found


def _touches_blocks(interventions: Sequence[Intervention], total: int) -> bool:
    return any(
        any(stream_changes(interventions, "block_input", layer, total).values())
        for layer in range(total + 1)
    )


def _block_taps(
    layers: Sequence[nn.Module],
    interventions: Sequence[Intervention],
    stream: Stream,
    place: Place,
) -> list[Swap]:
    """Blocks whose stream is changed and, where `stream` records, noted."""
    total = len(layers)
    last = stream_changes(interventions, "block_input", total, total)

    def call(
        index: int, steps: dict[bool, Change | None], inner: Any, *args: Any, **kwargs: Any
    ) -> Any:
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

    return [
        around(
            layer, partial(call, index, stream_changes(interventions, "block_input", index, total))
        )
        for index, layer in enumerate(layers)
    ]
