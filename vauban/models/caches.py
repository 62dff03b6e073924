"""Copies of mlx-lm's prompt caches: repeated over a batch, with rows dropped or
joined, or made longer.

One rule serves every kind of cache: an array in it has one entry per row on its first axis. Knows
caches; runs no model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    KVCache,
    RotatingKVCache,
)

Rows = Callable[[mx.array], mx.array]


def _mapped(value: Any, change: Rows) -> Any:
    """A copy of a cache, or of a part of one, with every array changed."""
    if isinstance(value, mx.array):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(v, change) for v in value)
    if isinstance(value, dict):
        return {k: _mapped(v, change) for k, v in value.items()}
    if not hasattr(value, "__dict__"):
        return value
    twin = copy.copy(value)
    if isinstance(value, KVCache) and value.keys is not None and value.values is not None:
        # It grows in steps of 256 positions; what lies past its offset need not be copied.
        twin.keys = value.keys[..., : value.offset, :]
        twin.values = value.values[..., : value.offset, :]
    for name, inner in vars(twin).items():
        setattr(twin, name, _mapped(inner, change))
    return twin


def copied(cache: Sequence[Any]) -> list[Any]:
    """Copies that can be written without a trace in `cache`; arrays are shared until then."""
    # A slice is a new array object: mlx writes into an object, not into what it shares.
    return [_mapped(state, lambda a: a[...]) for state in cache]


def arrays_in(cache: Sequence[Any]) -> list[mx.array]:
    """Every array in the caches, without the space reserved for later positions."""
    arrays: list[mx.array] = []
    for state in cache:
        _mapped(state, lambda a: arrays.append(a) or a)  # type: ignore[func-returns-value]
    return arrays


def repeated(cache: Sequence[Any], rows: int) -> list[Any]:
    """The caches of one prompt, once per row of a batch; `cache` stays as it is."""

    def change(a: mx.array) -> mx.array:
        return mx.repeat(a, rows, axis=0) if a.ndim and a.shape[0] == 1 else a[...]

    return [_mapped(state, change) for state in cache]


def merged(states: Sequence[Any], owners: Sequence[int]) -> Any:
    """mlx-lm's batched kind of a cache; row i holds what `states[owners[i]]` holds.

    Raises AttributeError for a kind that mlx-lm cannot batch.
    """
    first, rows = states[0], len(owners)
    inner = getattr(first, "caches", None)
    if isinstance(inner, list | tuple):
        joined = copy.copy(first)
        parts = zip(*(state.caches for state in states), strict=True)
        joined.caches = type(inner)(merged(part, owners) for part in parts)
        return joined
    # Older mlx-lm cannot merge caches that are empty.
    if first.empty() and isinstance(first, KVCache):
        return BatchKVCache([0] * rows)
    if first.empty() and isinstance(first, RotatingKVCache):
        return BatchRotatingKVCache(first.max_size, [0] * rows)
    if first.empty() and isinstance(first, ArraysCache):
        return ArraysCache(len(first.cache), left_padding=[0] * rows)
    batched = type(first).merge(list(states))
    if isinstance(batched, BatchKVCache | BatchRotatingKVCache):
        batched.filter(mx.array(list(owners)))
        return batched
    return type(first).merge([states[owner] for owner in owners])


def join_rows(cache: list[Any], other: Sequence[Any]) -> None:
    """Add the rows of `other` behind those of `cache`, in place; both are of batched kinds.

    Raises AttributeError for a kind that mlx-lm cannot join.
    """
    for state, more in zip(cache, other, strict=True):
        state.extend(more)


def stretched(cache: Sequence[Any], length: int, loud: float = 32.0) -> list[Any]:
    """Copies with `length` positions: the keys and values of `cache`, repeated.

    The first ones' values are `loud` times as large: a window that wrongly shows them then changes
    the result even among thousands of positions. The caches themselves cut their windows; states
    without positions (SSM) stay as they are.
    """
    twins = copied(cache)
    for state in twins:
        for inner in getattr(state, "caches", (state,)):
            keys, values = getattr(inner, "keys", None), getattr(inner, "values", None)
            if not isinstance(keys, mx.array) or not isinstance(values, mx.array):
                continue
            index = mx.arange(length - inner.offset) % inner.offset
            inner.values = values * loud
            inner.update_and_fetch(keys[..., index, :], values[..., index, :])
    return twins


def keep_rows(cache: list[Any], rows: mx.array, of: int) -> None:
    """Drop the other rows of caches that hold `of` rows, in place."""

    def change(a: mx.array) -> mx.array:
        return a[rows] if a.ndim and a.shape[0] == of else a

    for place, state in enumerate(cache):
        if hasattr(state, "left_padding") and hasattr(state, "filter"):
            # mlx-lm's batched caches drop padding along with rows.
            state.filter(rows)
        else:
            cache[place] = _mapped(state, change)


def described(cache: Sequence[Any]) -> list[tuple[Any, ...]]:
    """The kinds of caches, to tell one model's from another's."""

    def kind(state: Any) -> tuple[Any, ...]:
        inner = getattr(state, "caches", None)
        if isinstance(inner, list | tuple):
            return (type(state).__name__, *(kind(c) for c in inner))
        slots = getattr(state, "cache", None)
        return (type(state).__name__, len(slots) if isinstance(slots, list) else 0)

    return [kind(state) for state in cache]
