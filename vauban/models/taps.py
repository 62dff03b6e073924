"""Record and change the residual stream while a model runs its own forward pass.

The class of a module is swapped for a recording subclass for the time of a `with` block and
restored afterwards: no hooks, `isinstance` and attributes keep working, the model's own cached
forward runs unchanged. Knows modules and interventions; knows no tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vauban.errors import ArchitectureError, InputError
from vauban.interventions import Intervention, ModuleOutputs
from vauban.models.anatomy import anatomy
from vauban.models.substitute import substitute_weights
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


def _swap(module: nn.Module, **methods: Callable[..., Any]) -> None:
    cls = type(module)
    names = {f"__{n}__" if n == "call" else n: method for n, method in methods.items()}
    module.__class__ = type(f"Tapped{cls.__name__}", (cls,), names)


def _output_tap(
    module: nn.Module, steps: dict[bool, Change | None], stream: Stream, factor: float = 1.0
) -> None:
    """After the tap, factor · module(...) is changed as `steps` has it for prefill or decoding."""
    cls = type(module)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = cls.__call__(self, *args, **kwargs)
        step = steps[stream.prefill]
        if step is None:
            return out
        if isinstance(out, tuple):
            head, *rest = out
            return (step(head * factor) / factor, *rest)
        return step(out * factor) / factor if factor != 1.0 else step(out)

    _swap(module, call=call)


def _head_tap(embedding: nn.Module, step: Change) -> None:
    """A tied head reads `step(h)`. The class is the swapped one already, restored with it."""
    cls = type(embedding)

    def as_linear(self: Any, h: mx.array) -> mx.array:
        return cls.as_linear(self, step(h))  # type: ignore[attr-defined]

    _swap(embedding, as_linear=as_linear)


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
    changed: list[tuple[nn.Module, type]] = []

    def remember(module: nn.Module) -> None:
        if any(module is seen for seen, _ in changed):
            raise ArchitectureError(
                f"{type(module).__name__} is used at two places of the stream; "
                "this intervention cannot be applied exactly"
            )
        changed.append((module, type(module)))

    try:
        substitute_weights(model, interventions, remember)
        _tap_modules(model, interventions, stream, remember)
        sites = _branch_changes(model, interventions, total)
        for branch, steps in sites:
            remember(branch.module)
            _output_tap(branch.module, steps, stream, branch.multiplier)
        touched = _touches_blocks(interventions, total)
        if blocks and touched and not getattr(model, "_vauban_blocks_run", True):
            raise ArchitectureError(
                f"{type(model).__module__} never calls its blocks as modules, so the stream cannot "
                "be changed while it generates; use a run-time cut (EditPlan.virtual())"
            )
        if blocks and (stream.recording or touched):
            _tap_blocks(model, parts.layers, interventions, stream, remember)
        yield stream
    finally:
        for module, cls in reversed(changed):
            module.__class__ = cls


def _tap_modules(
    model: nn.Module,
    interventions: Sequence[Intervention],
    stream: Stream,
    remember: Callable[[nn.Module], None],
) -> None:
    """Changes at module outputs (the run-time cut), composed per module."""
    cuts = [i for i in interventions if isinstance(i, ModuleOutputs)]
    wanted = {path for cut in cuts for path in (*cut.factors, *cut.heads)}
    for path, module in model.named_modules():
        if path in wanted:
            wanted.discard(path)
            remember(module)
            step = compose([cut.output_change(path) for cut in cuts])
            _output_tap(module, {True: step, False: step}, stream)
            shared = compose([cut.head_change(path) for cut in cuts])
            if shared is not None:
                _head_tap(module, shared)
    if wanted:
        raise InputError(f"the model has no module {sorted(wanted)[0]}; was this plan made for it?")


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


def _tap_blocks(
    model: nn.Module,
    layers: Sequence[nn.Module],
    interventions: Sequence[Intervention],
    stream: Stream,
    remember: Callable[[nn.Module], None],
) -> None:
    total = len(layers)
    place = stream_place(model)
    last = stream_changes(interventions, "block_input", total, total)
    for index, layer in enumerate(layers):
        remember(layer)
        steps = stream_changes(interventions, "block_input", index, total)
        cls = type(layer)

        def call(
            self: nn.Module,
            *args: Any,
            _cls: type = cls,
            _index: int = index,
            _steps: dict[bool, Change | None] = steps,
            **kwargs: Any,
        ) -> Any:
            step = _steps[stream.prefill]
            if step is not None:
                h, args, kwargs = take(args, kwargs, place)
                args, kwargs = put(args, kwargs, place, step(h))
            if stream.recording:
                seen: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
                stream.arguments[_index] = seen
                if place in seen:
                    stream.inputs[_index] = seen[place]
                stream.rounds += _index == 0
            out = _cls.__call__(self, *args, **kwargs)
            head, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, ())
            if _index == total - 1:
                step = last[stream.prefill]
                head = step(head) if step is not None else head
            if stream.recording:
                stream.outputs[_index] = head
                stream.extras[_index] = len(rest)
            return (head, *rest) if isinstance(out, tuple) else head

        _swap(layer, call=call)


def stream_place(model: nn.Module) -> Place:
    """Which argument of a block holds the stream; found once by `verify_forward`."""
    return getattr(model, "_vauban_place", 0)


def record_reads(
    norms: Sequence[nn.Module | None], found: dict[int, mx.array], remember: Callable[..., None]
) -> None:
    """Note what each of `norms` reads: the stream as a block sees it where it has several."""
    for index, norm in enumerate(norms):
        if norm is None:
            raise ArchitectureError(f"residual {index} has no norm that reads the stream")
        remember(norm)
        cls = type(norm)

        def call(self: nn.Module, x: mx.array, _cls: type = cls, _index: int = index) -> mx.array:
            found[_index] = x
            return _cls.__call__(self, x)

        _swap(norm, call=call)
