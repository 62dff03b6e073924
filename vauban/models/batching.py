"""Right-padded, length-sorted batches over a shared prefix that is computed once.

Knows token lists and mlx-lm's caches; knows no prompts and no templates.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from vauban.errors import InputError
from vauban.interventions import Intervention
from vauban.models.forward import forward

# Tokens a batch may hold; keeps a batch of long prompts within a few hundred MB of activations.
TOKEN_BUDGET = 4096


@dataclass(frozen=True, eq=False)
class Batch:
    """`rows` indexes the caller's list; tokens (B, T) are right-padded with 0."""

    rows: list[int]
    tokens: mx.array
    lengths: list[int]


def shared_prefix(token_lists: Sequence[Sequence[int]], keep: int = 1) -> int:
    """Length of the common start of all lists, leaving at least `keep` own tokens to each."""
    lists = [list(t) for t in token_lists]
    shortest, longest = min(lists), max(lists)
    limit = min(len(t) for t in token_lists) - keep
    # The lexicographically smallest and largest list differ wherever any two do.
    for i, (a, b) in enumerate(zip(shortest, longest, strict=False)):
        if a != b or i >= limit:
            return max(0, min(i, limit))
    return max(0, limit)


def batches(
    token_lists: Sequence[Sequence[int]],
    *,
    skip: int = 0,
    batch_size: int | None = None,
    equal_lengths: bool = False,
) -> Iterator[Batch]:
    """Batches of similar length, longest first (so that memory peaks at once), `skip` tokens off.

    Order does not matter to the result; the rows say where each one belongs.
    """
    if any(len(t) == 0 for t in token_lists):
        empty = next(i for i, t in enumerate(token_lists) if not t)
        raise InputError(f"prompt {empty} has no tokens")
    order = sorted(range(len(token_lists)), key=lambda i: -len(token_lists[i]))
    start = 0
    while start < len(order):
        width = len(token_lists[order[start]]) - skip
        size = batch_size or max(1, min(64, TOKEN_BUDGET // max(width, 1)))
        rows = order[start : start + size]
        if equal_lengths:
            rows = [i for i in rows if len(token_lists[i]) - skip == width]
        lengths = [len(token_lists[i]) - skip for i in rows]
        tokens = [
            list(token_lists[i][skip:]) + [0] * (width - n)
            for i, n in zip(rows, lengths, strict=True)
        ]
        yield Batch(rows, mx.array(tokens), lengths)
        start += len(rows)


def can_share(model: nn.Module) -> bool:
    """Whether a prefix's cache may be repeated over a batch: plain and rotating KV caches."""
    return all(type(c) in (KVCache, RotatingKVCache) for c in make_prompt_cache(model))


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
    mx.eval([c.state for c in cache])
    return cache


def repeated(cache: list[Any] | None, rows: int) -> list[Any] | None:
    """A copy of a batch-1 KV cache for `rows` rows; the original stays as it is."""
    if cache is None:
        return None
    copies = []
    for state in cache:
        twin = copy.copy(state)
        twin.keys = mx.repeat(state.keys[..., : state.offset, :], rows, axis=0)
        twin.values = mx.repeat(state.values[..., : state.offset, :], rows, axis=0)
        copies.append(twin)
    return copies
