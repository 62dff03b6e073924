"""How a model walks its blocks, learnt by rehearsal, so that the explicit loop can walk it too.

The model's own forward is run once with blocks that compute nothing: it embeds, makes its masks
and says what it would hand to each block (mask, cache, per-layer inputs, shared state). The loop
then calls the blocks itself, and the model's own norm and head finish. Whatever a family does to
its embedding, its masks or its logits therefore happens in its own code. Knows modules and arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vauban.errors import ArchitectureError
from vauban.models.caches import copied
from vauban.models.swap import around, swapped


@dataclass(frozen=True)
class _Passed:
    """Stands for the extra value number `item` that call number `call` returns to later calls."""

    call: int
    item: int


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a block: which block, and what it gets besides the stream.

    `extras` counts the values it returns after the stream (0 for a plain array).
    """

    block: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    extras: int


@dataclass(frozen=True, eq=False)
class Walk:
    """The stream before the first block, and the calls in their order."""

    start: mx.array
    calls: tuple[Call, ...]


class Unwalkable(ArchitectureError):
    """The trunk does something between its blocks that the explicit loop would miss."""


class _Rehearsed(Exception):
    """Raised by the last block of a rehearsal: what follows it is not rehearsed."""


# Which argument of a block holds the stream: its number, or its name where it is passed by name.
Place = int | str
Stub = Callable[[int, mx.array, tuple[Any, ...], dict[str, Any]], Any]


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


def _stubs(layers: Sequence[nn.Module], call: Stub, place: Place) -> AbstractContextManager[None]:
    """Blocks that hand their stream (the argument at `place`) to `call` instead of computing."""

    def stub(index: int, inner: Any, *args: Any, **kwargs: Any) -> Any:
        return call(index, *take(args, kwargs, place))

    return swapped(around(layer, partial(stub, index)) for index, layer in enumerate(layers))


def rehearse(
    model: nn.Module,
    layers: Sequence[nn.Module],
    tokens: mx.array,
    cache: list[Any],
    extras: Sequence[int],
    place: Place,
) -> Walk:
    """The walk of `tokens`; `extras[i]` says how many values block i returns after the stream.

    `place` is the argument of a block that holds the stream. Raises Unwalkable when the trunk
    changes the stream between two blocks.
    """
    starts: list[mx.array] = []
    calls: list[Call] = []
    returned: list[mx.array] = []

    def call(index: int, h: mx.array, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if returned and h is not returned[-1]:
            raise Unwalkable(f"the trunk changes the stream before block {index}")
        if not starts:
            starts.append(h)
        # A new array object, so that a trunk that works on it cannot go unnoticed.
        returned.append(h + 0)
        number = len(calls)
        calls.append(Call(index, args, kwargs, extras[index]))
        if number == len(layers) - 1:
            raise _Rehearsed
        passed = [_Passed(number, item) for item in range(extras[index])]
        return (returned[-1], *passed) if passed else returned[-1]

    with _stubs(layers, call, place), suppress(_Rehearsed):
        model(tokens, cache=cache)
    if [c.block for c in calls] != list(range(len(layers))):
        raise Unwalkable(f"the trunk calls blocks {[c.block for c in calls]}")
    return Walk(starts[0], tuple(calls))


def arguments(
    call: Call, results: Sequence[tuple[Any, ...]], h: mx.array, place: Place
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments: the stream `h`, and the values that earlier calls really returned."""

    def real(value: Any) -> Any:
        return results[value.call][value.item] if isinstance(value, _Passed) else value

    args = [real(a) for a in call.args]
    return put(args, {k: real(v) for k, v in call.kwargs.items()}, place, h)


def finish(
    model: nn.Module,
    layers: Sequence[nn.Module],
    tokens: mx.array,
    cache: list[Any],
    h: mx.array,
    results: Sequence[tuple[Any, ...]],
    place: Place,
) -> mx.array:
    """Logits of the stream `h` behind the last block, by the model's own norm and head.

    The trunk runs once more over blocks that do nothing, so it gets copies of the caches: what it
    keeps there itself (LongCat's n-gram context) must not be written twice.
    """
    last = len(layers) - 1

    def call(index: int, x: mx.array, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = h if index == last else x
        return (out, *results[index]) if results[index] else out

    with _stubs(layers, call, place):
        return model(tokens, cache=copied(cache))
