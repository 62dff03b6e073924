"""One pass over right-padded tokens as they are given: checks the input, gathers the residuals.

Knows the verified path and the positions; does not ask whether a model's rows may be padded, which
is `forward`'s part.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from vauban.errors import ArchitectureError, InputError
from vauban.interventions import Intervention, started
from vauban.models.anatomy import Anatomy, anatomy
from vauban.models.caches import described
from vauban.models.families import family_of
from vauban.models.paths import by_hand, by_tap, reading, several_streams
from vauban.models.verify import verify_forward

Positions = Literal["last", "all"] | tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class ForwardOutput:
    """`logits` (B, T, V) or (B, 1, V) or None; `residual` (B, L+1, P, d) or None.

    residual r < L is the input of block r, after interventions at that site; residual L is the
    output of the last block, before the final norm.
    """

    logits: mx.array | None
    residual: mx.array | None


def forward_pass(
    model: nn.Module,
    tokens: mx.array,
    *,
    lengths: Sequence[int] | None = None,
    cache: list[Any] | None = None,
    positions: Positions = "last",
    interventions: Sequence[Intervention] = (),
    logits: bool | Literal["last"] = True,
    streams: Literal["read", "all"] = "read",
) -> ForwardOutput:
    """`forward` without its question whether rows may be padded."""
    parts = anatomy(model)
    rows, width = _check_tokens(tokens, parts)
    counts = _check_lengths(lengths, rows, width)
    index = _position_index(positions, counts, width)
    check = verify_forward(model)
    cache = _check_cache(model, cache, rows)
    interventions = started(interventions, counts)
    run = by_hand if check.path == "manual" else by_tap
    last = mx.array([n - 1 for n in counts])
    several = several_streams(model)
    with ExitStack() as stack:
        reads = stack.enter_context(reading(parts)) if several else {}
        out, residuals = run(
            model, parts, tokens, cache, interventions, index is not None, logits, last
        )
    if index is None:
        return ForwardOutput(out, None)
    if several and streams == "read":
        residuals = [reads[r] for r in range(parts.n_layers + 1)]
    elif several:
        kept = [_gather_streams(h, rows, index) for h in residuals]
        return ForwardOutput(out, mx.stack(kept, axis=1))
    gather = index[:, :, None]
    kept = [mx.take_along_axis(_rows(h, rows), gather, axis=1) for h in residuals]
    return ForwardOutput(out, mx.stack(kept, axis=1))


def _gather_streams(h: mx.array, rows: int, index: mx.array) -> mx.array:
    """(B, P, S, d) of streams stored as (S, B, T, d) or (B, T, S, d)."""
    if h.ndim != 4:
        return mx.take_along_axis(_rows(h, rows), index[:, :, None], axis=1)[:, :, None]
    if h.shape[0] != rows or h.shape[1] == rows:
        h = h.transpose(1, 2, 0, 3)
    return mx.take_along_axis(h, index[:, :, None, None], axis=1)


def _rows(h: mx.array, rows: int) -> mx.array:
    if h.ndim != 3 or h.shape[0] != rows:
        raise ArchitectureError(
            f"the stream has shape {h.shape} between blocks; expected (batch, tokens, d)"
        )
    return h


def _check_tokens(tokens: mx.array, parts: Anatomy) -> tuple[int, int]:
    if tokens.ndim != 2 or tokens.size == 0:
        raise InputError(f"tokens have shape {tokens.shape}; expected (batch, length), not empty")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= parts.vocabulary:
        raise InputError(
            f"token ids run from {low} to {high}; the vocabulary holds 0 to {parts.vocabulary - 1}"
        )
    return int(tokens.shape[0]), int(tokens.shape[1])


def _check_lengths(lengths: Sequence[int] | None, rows: int, width: int) -> list[int]:
    if lengths is None:
        return [width] * rows
    counts = [int(n) for n in lengths]
    if len(counts) != rows:
        raise InputError(f"{len(counts)} lengths for {rows} rows of tokens")
    if min(counts) < 1 or max(counts) > width:
        raise InputError(f"lengths {min(counts)} to {max(counts)}; expected 1 to {width}")
    return counts


def _check_cache(model: nn.Module, cache: list[Any] | None, rows: int) -> list[Any]:
    """`cache`, or a fresh one; it must be of this model's kinds and hold as many rows."""
    fresh = make_prompt_cache(model)
    if cache is None:
        return fresh
    given, expected = described(cache), described(fresh)
    if len(given) != len(expected):
        raise InputError(
            f"the cache has {len(given)} entries, {family_of(model)} needs {len(expected)}; "
            "was it made for another model?"
        )
    for i, (a, b) in enumerate(zip(given, expected, strict=True)):
        # mlx-lm's batched kinds stand for the plain ones.
        if a != b and a[0] != f"Batch{b[0]}":
            raise InputError(
                f"cache {i} is a {a[0]}, {family_of(model)} needs a {b[0]}; "
                "was it made for another model?"
            )
    held = {
        int(keys.shape[0])
        for keys in (getattr(state, "keys", None) for state in cache)
        if isinstance(keys, mx.array)
    }
    if held - {rows}:
        raise InputError(f"the cache holds {max(held)} rows, the tokens have {rows}")
    return cache


def _position_index(positions: Positions, counts: list[int], width: int) -> mx.array | None:
    """(B, P) column of each wanted position, None when no residual is wanted."""
    if positions is None:
        return None
    if isinstance(positions, str):
        if positions == "last":
            positions = (-1,)
        elif positions == "all":
            return mx.broadcast_to(mx.arange(width)[None], (len(counts), width))
        else:
            raise InputError(f"positions is {positions!r}; expected 'last', 'all', None or ints")
    offsets = tuple(int(p) for p in positions)
    if not offsets or max(offsets) >= 0:
        raise InputError(f"positions {offsets}; expected negative ints counted from the last token")
    if -min(offsets) > min(counts):
        raise InputError(
            f"position {min(offsets)} lies before the first token of a prompt of "
            f"{min(counts)} tokens"
        )
    return mx.array(counts)[:, None] + mx.array(offsets)[None]
