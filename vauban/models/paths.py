"""The two ways to walk a model: the explicit loop over its blocks, and the tap in its own forward.

Both return the logits and the stream at every residual, and give the same numbers; `verify` decides
between them. Knows modules, caches and interventions; checks no input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_reduce

from vauban.errors import ArchitectureError
from vauban.interventions import Intervention
from vauban.models.anatomy import Anatomy, anatomy
from vauban.models.families import LOOPS, READ_BY_NORM, Visit, family_of
from vauban.models.notes import note, notes
from vauban.models.swap import around, swapped
from vauban.models.taps import Stream, stream_changes, tapped
from vauban.models.walk import arguments, finish, rehearse

# Weights that one evaluation may read: macOS ends a GPU command that runs for several seconds.
_BYTES_AT_ONCE = 4 * 2**30
evaluate = mx.eval


def several_streams(model: nn.Module) -> bool:
    """Whether the blocks hand on something else than what their norms read."""
    return notes(model).several_streams or family_of(model) in READ_BY_NORM


@contextmanager
def reading(parts: Anatomy) -> Iterator[dict[int, mx.array]]:
    """What each block's first norm and the final norm read, by residual index."""
    found: dict[int, mx.array] = {}
    swaps = []
    norms = [layer.get("input_layernorm") for layer in parts.layers]
    for residual, norm in enumerate([*norms, parts.norm]):
        if norm is None:
            raise ArchitectureError(f"residual {residual} has no norm that reads the stream")

        def read(call: Any, x: mx.array, _residual: int = residual) -> mx.array:
            found[_residual] = x
            return call(x)

        swaps.append(around(norm, read))
    with swapped(swaps):
        yield found


def pick(h: mx.array, logits: bool | Literal["last"], last: mx.array) -> mx.array:
    if logits != "last":
        return h
    if h.ndim != 3:
        raise ArchitectureError(f"the stream has shape {h.shape}; ask for all logits")
    return mx.take_along_axis(h, last[:, None, None], axis=1)


def by_tap(
    model: nn.Module,
    parts: Anatomy,
    tokens: mx.array,
    cache: list[Any],
    interventions: Sequence[Intervention],
    record: bool,
    logits: bool | Literal["last"],
    last: mx.array,
    stream: Stream | None = None,
) -> tuple[mx.array | None, list[mx.array]]:
    """The model's own forward, its blocks recording."""
    stream = stream or Stream(recording=record)
    with tapped(model, interventions, stream=stream):
        out = model(tokens, cache=cache)
    if record and len(stream.residuals) != parts.n_layers + 1:
        raise ArchitectureError(
            f"{family_of(model)} does not run its {parts.n_layers} blocks as modules "
            f"({len(stream.inputs)} were seen); its stream cannot be recorded"
        )
    return (pick(out, logits, last) if logits else None), stream.residuals


def by_hand(
    model: nn.Module,
    parts: Anatomy,
    tokens: mx.array,
    cache: list[Any],
    interventions: Sequence[Intervention],
    record: bool,
    logits: bool | Literal["last"],
    last: mx.array,
) -> tuple[mx.array | None, list[mx.array]]:
    """The explicit loop: embed, blocks, norm, head. No hook sees the stream but this function."""
    n = parts.n_layers
    kept: dict[int, mx.array] = {}
    stride = evaluation_stride(model, parts)

    def visit(h: mx.array, residual: int) -> mx.array:
        step = stream_changes(interventions, "block_input", residual, n)[True]
        h = step(h) if step else h
        if record:
            kept[residual] = h
        if stride and residual % stride == 0:
            evaluate(h)
        return h

    loop = LOOPS.get(family_of(model))
    with tapped(model, interventions, blocks=False):
        if loop is not None:
            h = pick(loop(model, tokens, cache, visit), logits, last)
            out = _head(model, parts, h) if logits else None
        else:
            out = _walked(model, parts, tokens, cache, logits, last, visit)
    return out, [kept[residual] for residual in sorted(kept)]


def _walked(
    model: nn.Module,
    parts: Anatomy,
    tokens: mx.array,
    cache: list[Any],
    logits: bool | Literal["last"],
    last: mx.array,
    visit: Visit,
) -> mx.array | None:
    """The loop of every family without one of its own."""
    place = notes(model).place
    walk = rehearse(model, parts.layers, tokens, cache, notes(model).extras, place)
    h = walk.start
    results: list[tuple[Any, ...]] = []
    for call in walk.calls:
        args, kwargs = arguments(call, results, visit(h, call.block), place)
        out = parts.layers[call.block](*args, **kwargs)
        h, *rest = out if isinstance(out, tuple) else (out,)
        results.append(tuple(rest))
    h = visit(h, parts.n_layers)
    if several_streams(model):
        # The norms must run to say what they read, and a position is no axis of several streams.
        return pick(finish(model, parts.layers, tokens, cache, h, results, place), logits, last)
    if not logits:
        return None
    return finish(model, parts.layers, tokens, cache, pick(h, logits, last), results, place)


def unembed(model: nn.Module, h: mx.array) -> mx.array:
    """Logits (..., V) of residuals (..., d) read by the final norm and the head alone.

    The logit lens (nostalgebraist 2020); what a family does to its logits afterwards is left out.
    """
    parts = anatomy(model)
    return _head(model, parts, h if parts.norm is None else parts.norm(h))


def _head(model: nn.Module, parts: Anatomy, h: mx.array) -> mx.array:
    if parts.head_path is None:
        return parts.embedding.as_linear(h)
    return dict(model.named_modules())[parts.head_path](h)


def evaluation_stride(model: nn.Module, parts: Anatomy) -> int:
    """Evaluate the stream every so many blocks; 0 for models small enough for one evaluation."""
    known = notes(model).stride
    if known is None:
        size = tree_reduce(lambda total, p: total + p.nbytes, model.parameters(), 0)
        groups = -(-size // _BYTES_AT_ONCE)
        known = max(1, parts.n_layers // groups) if groups > 1 else 0
        note(model, stride=known)
    return known
