"""Two ways to run a model and see its stream: the explicit loop, and the tap in its own forward.

Both return the logits and the stream at every residual, and give the same numbers; `parity` decides
between them. How a model walks its blocks is learnt by rehearsal: its own forward is run once with
blocks that compute nothing, so it embeds, makes its masks and says what it would hand to each block
(mask, cache, per-layer inputs, shared state). The loop then calls the blocks itself, and the
model's own norm and head finish. Whatever a family does to its embedding, its masks or its logits
therefore happens in its own code. Knows modules, caches and interventions; checks no input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_reduce

from vauban.errors import ArchitectureError
from vauban.interventions import Intervention
from vauban.models.anatomy import Anatomy, anatomy
from vauban.models.caches import copied
from vauban.models.families import LOOPS, READ_BY_NORM, Visit, family_of
from vauban.models.notes import note, notes
from vauban.models.swap import around, swapped
from vauban.models.taps import Place, Stream, put, stream_changes, take, tapped

# Weights that one evaluation may read: macOS ends a GPU command that runs for several seconds.
_BYTES_AT_ONCE = 4 * 2**30
evaluate = mx.eval


class Unwalkable(ArchitectureError):
    """The trunk does something between its blocks that the explicit loop would miss."""


class _Rehearsed(Exception):
    """Raised by the last block of a rehearsal: what follows it is not rehearsed."""


@dataclass(frozen=True)
class _Passed:
    """Stands for the extra value number `item` that call number `call` returns to later calls."""

    call: int
    item: int


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a block: what it gets besides the stream."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def arguments(
        self, results: Sequence[tuple[Any, ...]], h: mx.array, place: Place
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """With the stream `h` at its place, and the values that earlier calls really returned."""

        def real(value: Any) -> Any:
            return results[value.call][value.item] if isinstance(value, _Passed) else value

        args = [real(a) for a in self.args]
        return put(args, {k: real(v) for k, v in self.kwargs.items()}, place, h)


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass: right-padded tokens (B, T) read on top of `cache`, which is written.

    `interventions` are started. `record` asks for the residuals, `logits` for all logits, those at
    each row's `last` real token (B,) or at several columns of each row (B, P), or none.
    """

    tokens: mx.array
    cache: list[Any]
    interventions: Sequence[Intervention] = ()
    record: bool = True
    logits: bool | Literal["last"] = True
    last: mx.array | None = None

    def at_last(self, h: mx.array) -> mx.array:
        """(B, P, ...) at the tokens where logits are wanted, those at `last` alone; else `h`."""
        if self.logits != "last" or self.last is None:
            return h
        if h.ndim != 3:
            raise ArchitectureError(f"the stream has shape {h.shape}; ask for all logits")
        columns = self.last if self.last.ndim == 2 else self.last[:, None]
        return mx.take_along_axis(h, columns[:, :, None], axis=1)


Run = tuple[mx.array | None, list[mx.array]]
"""Logits, and the stream at every residual."""


def by_tap(model: nn.Module, given: Pass, stream: Stream | None = None) -> Run:
    """The model's own forward, its blocks recording."""
    total = anatomy(model).n_layers
    stream = stream or Stream(recording=given.record)
    with tapped(model, given.interventions, stream=stream):
        out = model(given.tokens, cache=given.cache)
    if given.record and len(stream.residuals) != total + 1:
        raise ArchitectureError(
            f"{family_of(model)} does not run its {total} blocks as modules "
            f"({len(stream.inputs)} were seen); its stream cannot be recorded"
        )
    return (given.at_last(out) if given.logits else None), stream.residuals


def by_hand(model: nn.Module, given: Pass) -> Run:
    """The explicit loop: embed, blocks, norm, head."""
    parts = anatomy(model)
    kept: dict[int, mx.array] = {}
    stride = _evaluation_stride(model, parts)

    def visit(h: mx.array, residual: int) -> mx.array:
        changes = stream_changes(given.interventions, "block_input", residual, parts.n_layers)
        step = changes[True]
        h = step(h) if step else h
        if given.record:
            kept[residual] = h
        if stride and residual % stride == 0:
            evaluate(h)
        return h

    loop = LOOPS.get(family_of(model))
    with tapped(model, given.interventions, blocks=False):
        if loop is not None:
            h = given.at_last(loop(model, given.tokens, given.cache, visit))
            out = read_out(model, parts, h) if given.logits else None
        else:
            out = _walked(model, parts.layers, given, visit)
    return out, [kept[residual] for residual in sorted(kept)]


def _walked(
    model: nn.Module, layers: Sequence[nn.Module], given: Pass, visit: Visit
) -> mx.array | None:
    """The loop of every family without one of its own; the logits that are wanted."""
    h, calls = _rehearse(model, layers, given.tokens, given.cache)
    results: list[tuple[Any, ...]] = []
    for index, (layer, call) in enumerate(zip(layers, calls, strict=True)):
        args, kwargs = call.arguments(results, visit(h, index), notes(model).place)
        out = layer(*args, **kwargs)
        h, *rest = out if isinstance(out, tuple) else (out,)
        results.append(tuple(rest))
    h = visit(h, len(layers))
    if several_streams(model):
        # The norms must run to say what they read, and a position is no axis of several streams.
        return given.at_last(finish(model, layers, given.tokens, given.cache, h, results))
    if not given.logits:
        return None
    return finish(model, layers, given.tokens, given.cache, given.at_last(h), results)


def _rehearse(
    model: nn.Module, layers: Sequence[nn.Module], tokens: mx.array, cache: list[Any]
) -> tuple[mx.array, list[_Call]]:
    """The stream before the first block, and the call of each block.

    Raises Unwalkable when the trunk changes the stream between two blocks, or calls them in another
    order.
    """
    starts: list[mx.array] = []
    calls: list[_Call] = []
    order: list[int] = []
    returned: list[mx.array] = []
    extras = notes(model).extras

    def call(index: int, h: mx.array, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if returned and h is not returned[-1]:
            raise Unwalkable(f"the trunk changes the stream before block {index}")
        starts.append(h)
        # A new array object, so that a trunk that works on it cannot go unnoticed.
        returned.append(h + 0)
        number = len(calls)
        calls.append(_Call(args, kwargs))
        order.append(index)
        if number == len(layers) - 1:
            raise _Rehearsed
        passed = [_Passed(number, item) for item in range(extras[index])]
        return (returned[-1], *passed) if passed else returned[-1]

    with _stubs(layers, call, notes(model).place), suppress(_Rehearsed):
        model(tokens, cache=cache)
    if order != list(range(len(layers))):
        raise Unwalkable(f"the trunk calls blocks {order}")
    return starts[0], calls


def finish(
    model: nn.Module,
    layers: Sequence[nn.Module],
    tokens: mx.array,
    cache: list[Any],
    h: mx.array,
    results: Sequence[tuple[Any, ...]],
) -> mx.array:
    """Logits of the stream `h` behind the last block, by the model's own norm and head.

    The trunk runs once more over blocks that do nothing, so it gets copies of the caches: what it
    keeps there itself (LongCat's n-gram context) must not be written twice.
    """

    def call(index: int, x: mx.array, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = h if index == len(layers) - 1 else x
        return (out, *results[index]) if results[index] else out

    with _stubs(layers, call, notes(model).place):
        return model(tokens, cache=copied(cache))


def _stubs(
    layers: Sequence[nn.Module], call: Callable[..., Any], place: Place
) -> AbstractContextManager[None]:
    """Blocks that hand (index, stream, args, kwargs) to `call` instead of computing."""

    def stub(index: int, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return call(index, *take(args, kwargs, place))

    return swapped(around(layer, partial(stub, index)) for index, layer in enumerate(layers))


def several_streams(model: nn.Module) -> bool:
    """Whether the blocks hand on something else than what their norms read."""
    return notes(model).several_streams or family_of(model) in READ_BY_NORM


@contextmanager
def norm_inputs(parts: Anatomy) -> Iterator[dict[int, mx.array]]:
    """What each block's first norm and the final norm read, by residual index."""
    inputs: dict[int, mx.array] = {}

    def read(residual: int, inner: Callable[..., Any], x: mx.array) -> mx.array:
        inputs[residual] = x
        return inner(x)

    norms: list[Any] = [*(layer.get("input_layernorm") for layer in parts.layers), parts.norm]
    if None in norms:
        raise ArchitectureError(f"residual {norms.index(None)} has no norm that reads the stream")
    with swapped(around(norm, partial(read, index)) for index, norm in enumerate(norms)):
        yield inputs


def read_out(model: nn.Module, parts: Anatomy, h: mx.array) -> mx.array:
    """Logits of what stands behind the final norm, by the head alone."""
    if parts.head_path is None:
        return parts.embedding.as_linear(h)
    return dict(model.named_modules())[parts.head_path](h)


def _evaluation_stride(model: nn.Module, parts: Anatomy) -> int:
    """Evaluate the stream every so many blocks; 0 for models small enough for one evaluation."""
    stride = notes(model).stride
    if stride is None:
        size = tree_reduce(lambda total, p: total + p.nbytes, model.parameters(), 0)
        groups = -(-size // _BYTES_AT_ONCE)
        stride = max(1, parts.n_layers // groups) if groups > 1 else 0
        note(model, stride=stride)
    return stride
