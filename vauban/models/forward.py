"""The forward pass that returns the residual stream: an explicit loop, verified, else the tap.

Two paths give the same numbers. "manual" walks `model.layers` itself: embed, mask, blocks, norm,
head. "tap" runs the model's own forward with recording blocks, for every family that the loop does
not cover. Which one is used is decided once per model by `verify_forward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from vauban.errors import ArchitectureError, InputError
from vauban.interventions import Intervention
from vauban.models.families import family_of
from vauban.models.passes import ForwardOutput, Positions, forward_pass
from vauban.models.rows import can_pad


def forward(
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
    """Run `model` on right-padded `tokens` (B, T) and return logits and residuals.

    `lengths` (B,) counts each row's real tokens (default: all T). `positions`: "last", "all",
    None (no residuals), or a tuple of negative ints counted from each row's last real token.
    `cache`: a filled prompt cache of batch size B, updated in place; default a fresh one.
    `logits`: True for all positions, "last" for each row's last real token, False for none.
    `streams`: where a model carries several streams (Gemma 3n, DeepSeek V4.1) "read" returns what
    the next block's norm reads, "all" the streams themselves, (B, L+1, P, S, d).

    Raises InputError for empty or mismatched input, positions beyond a prompt and token ids out
    of range; ArchitectureError when no verified path exists.

    >>> import mlx.core as mx, vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> out = vauban.forward(model, mx.array([vauban.encode_chat(tokenizer, "Hello")]))
    >>> out.residual.shape[1] == len(model.layers) + 1
    True
    """
    options: dict[str, Any] = {
        "positions": positions,
        "interventions": interventions,
        "logits": logits,
        "streams": streams,
    }
    uneven = lengths is not None and len({int(n) for n in lengths}) > 1
    if not uneven or can_pad(model):
        return forward_pass(model, tokens, lengths=lengths, cache=cache, **options)
    if cache is not None:
        raise ArchitectureError(
            f"{family_of(model)} reads padded rows wrongly; give rows of one length with a cache"
        )
    return _by_length(model, tokens, [int(n) for n in lengths or ()], options)


def _by_length(
    model: nn.Module, tokens: mx.array, lengths: list[int], options: dict[str, Any]
) -> ForwardOutput:
    """Rows of one length at a time, put back in their order; what lies past a row's end is 0."""
    if len(lengths) != tokens.shape[0] or min(lengths) < 1 or max(lengths) > tokens.shape[1]:
        raise InputError(f"lengths {lengths} do not fit tokens of shape {tokens.shape}")
    order: list[int] = []
    outs: list[ForwardOutput] = []
    for length in sorted(set(lengths)):
        rows = [i for i, n in enumerate(lengths) if n == length]
        order += rows
        outs.append(forward_pass(model, tokens[mx.array(rows)][:, :length], **options))
    back = mx.argsort(mx.array(order))

    def joined(parts: list[mx.array | None], axis: int) -> mx.array | None:
        found = [part for part in parts if part is not None]
        if not found:
            return None
        width = max(part.shape[axis] for part in found)
        return mx.concatenate([_padded(part, axis, width) for part in found])[back]

    return ForwardOutput(
        joined([out.logits for out in outs], 1), joined([out.residual for out in outs], 2)
    )


def _padded(part: mx.array, axis: int, width: int) -> mx.array:
    return mx.pad(part, [(0, width - part.shape[i] if i == axis else 0) for i in range(part.ndim)])
