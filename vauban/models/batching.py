"""Right-padded, length-sorted batches over a shared prefix that is computed once.

Knows token lists and mlx-lm's caches; knows no prompts and no templates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from vauban.errors import InputError
from vauban.interventions import Intervention
from vauban.models import caches
from vauban.models.anatomy import anatomy, is_half
from vauban.models.forward import forward
from vauban.models.loading import device_info
from vauban.prompts import common_prefix

# Tokens a batch may hold at most: more would not be faster.
TOKEN_BUDGET = 4096
# A tight batch ends where rows fill less than this share of its width, but not below this size.
_TIGHT = 0.8
_ENOUGH = 192
# A batch may take this share of the memory that is free.
_SHARE = 0.125


@dataclass(frozen=True, eq=False)
class Batch:
    """`rows` indexes the caller's list; tokens (B, T) are right-padded with 0."""

    rows: list[int]
    tokens: mx.array
    lengths: list[int]


def shared_prefix(token_lists: Sequence[Sequence[int]], keep: int = 1) -> int:
    """Length of the common start of all lists, leaving at least `keep` own tokens to each."""
    return max(0, min(common_prefix(token_lists), min(map(len, token_lists)) - keep))


def token_budget(model: nn.Module) -> int:
    """Tokens that a batch may hold within an eighth of the memory that is free now.

    A token costs one vector of the stream per residual and about thirty more inside a block.
    """
    room = int(_SHARE * device_info().memory_available)
    return max(64, min(TOKEN_BUDGET, room // _token_bytes(model)))


def _token_bytes(model: nn.Module) -> int:
    parts = anatomy(model)
    size = 4 if not is_half(parts) else 2
    return size * parts.d_model * (parts.n_layers + 1 + 30)


def measuring_bytes(model: nn.Module) -> int:
    """What measuring needs besides the weights: one batch, and the moments of both classes."""
    parts = anatomy(model)
    moments = 8 * 4 * (parts.n_layers + 1) * parts.d_model
    return token_budget(model) * _token_bytes(model) + moments


def batches(
    token_lists: Sequence[Sequence[int]],
    *,
    skip: int = 0,
    batch_size: int | None = None,
    equal_lengths: bool = False,
    budget: int = TOKEN_BUDGET,
    tight: bool = False,
) -> Iterator[Batch]:
    """Batches of similar length, longest first (so that memory peaks at once), `skip` tokens off.

    Without `batch_size` a batch holds at most `budget` tokens and 64 rows. `tight` ends a batch
    that is large enough before a row that would be padding for a fifth or more: right for one
    pass over the prompts, wrong for generation, where every batch is decoded step by step.

    Order does not matter to the result; the rows say where each one belongs.
    """
    if any(len(t) == 0 for t in token_lists):
        empty = next(i for i, t in enumerate(token_lists) if not t)
        raise InputError(f"prompt {empty} has no tokens")
    order = sorted(range(len(token_lists)), key=lambda i: -len(token_lists[i]))
    start = 0
    while start < len(order):
        width = len(token_lists[order[start]]) - skip
        size = batch_size or max(1, min(64, budget // max(width, 1)))
        rows = order[start : start + size]
        if equal_lengths:
            rows = [i for i in rows if len(token_lists[i]) - skip == width]
        elif tight and batch_size is None:
            full = [k * width >= _ENOUGH for k in range(len(rows))]
            short = [len(token_lists[i]) - skip <= _TIGHT * width for i in rows]
            ends = (k for k, both in enumerate(zip(full, short, strict=True)) if all(both))
            rows = rows[: next(ends, len(rows))]
        lengths = [len(token_lists[i]) - skip for i in rows]
        tokens = [
            list(token_lists[i][skip:]) + [0] * (width - n)
            for i, n in zip(rows, lengths, strict=True)
        ]
        yield Batch(rows, mx.array(tokens), lengths)
        start += len(rows)


def prefix_cache(
    model: nn.Module, prefix: Sequence[int], interventions: Sequence[Intervention]
) -> list[Any] | None:
    """The cache after reading `prefix` once under `interventions`; None for an empty prefix."""
    if not prefix:
        return None
    cache = make_prompt_cache(model)
    forward(
        model,
        mx.array([list(prefix)]),
        cache=cache,
        positions=None,
        interventions=interventions,
        logits=False,
    )
    caches.evaluate(cache)
    return cache


def repeated(cache: list[Any] | None, rows: int) -> list[Any] | None:
    """A copy of the cache of one prompt for `rows` rows; the original stays as it is."""
    return None if cache is None else caches.repeated(cache, rows)
