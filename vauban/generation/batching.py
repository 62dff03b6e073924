"""Sets of prompts in right-padded batches of similar length, over a prefix that is read once.

`Batches` sorts and pads; `PromptReader` reads one set again and again under different changes and
skips the blocks before a change, whose residuals are as they were recorded. Knows token lists and
mlx-lm's caches; knows no text and no scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from vauban._arrays import flat_parameters
from vauban._common import probe_tokens
from vauban.errors import InputError
from vauban.interventions import Intervention, shares_prefix
from vauban.models import caches
from vauban.models.anatomy import anatomy, is_half
from vauban.models.families import LOOPS, family_of
from vauban.models.forward import ForwardOutput, can_pad, can_share, forward
from vauban.models.info import device_info
from vauban.models.notes import note, notes
from vauban.models.parity import verify_forward
from vauban.models.swap import around, swapped
from vauban.models.walk import several_streams
from vauban.prompts import common_prefix

# Tokens a batch may hold at most: more would not be faster.
TOKEN_BUDGET = 4096
# Rows of a batch; of answers several times as many, where their caches fit: a step of decoding
# reads all weights, whether for 64 rows or for 256 (Qwen2.5-Coder-0.5B on a CPU: 16.6 ms a token
# at 64 rows, 14.4 at 128, 13.2 at 256).
ROWS, MOST_ROWS = 64, 256
# A tight batch ends where rows fill less than this share of its width, but not below this size.
_TIGHT = 0.8
_LARGE_ENOUGH = 192
# A batch may take this share of the memory beside the weights.
_SHARE = 0.125
# Recorded streams may take this much; beyond it every change is read from the first block.
_RECORD_BYTES = 2 * 2**30


@dataclass(frozen=True, eq=False)
class Batch:
    """`rows` indexes the caller's list; tokens (B, T) are right-padded with 0."""

    rows: list[int]
    tokens: mx.array
    lengths: list[int]


def shared_prefix(token_lists: Sequence[Sequence[int]], keep: int = 1) -> int:
    """Length of the common start of all lists, leaving at least `keep` tokens to each."""
    return max(0, min(common_prefix(token_lists), min(map(len, token_lists)) - keep))


def token_budget(model: nn.Module) -> int:
    """Tokens that a batch may hold within an eighth of the memory that the weights leave.

    A token costs one vector of the stream per residual and about thirty more inside a block. Other
    programs do not matter: batches, and with them the last bits of what is measured and written,
    are the same in every run on a machine.
    """
    weights = sum(int(p.nbytes) for p in flat_parameters(model).values())
    room = int(_SHARE * (device_info().memory_total - weights))
    return max(64, min(TOKEN_BUDGET, room // _token_bytes(model)))


def measuring_bytes(model: nn.Module) -> int:
    """What measuring needs besides the weights: one batch, and the moments of both classes."""
    parts = anatomy(model)
    moments = 8 * 4 * (parts.n_layers + 1) * parts.d_model
    return token_budget(model) * _token_bytes(model) + moments


def _token_bytes(model: nn.Module) -> int:
    parts = anatomy(model)
    return (2 if is_half(parts) else 4) * parts.d_model * (parts.n_layers + 1 + 30)


def answer_rows(model: nn.Module, tokens: int) -> int:
    """Rows of `tokens` each, prompt and answer, whose caches take an eighth of the free memory.

    At least `ROWS`, at most `MOST_ROWS`. What a cache takes is measured on eight tokens, once.
    """
    size = notes(model).cache_bytes
    if size is None:
        cache = make_prompt_cache(model)
        mx.eval(model(mx.array([probe_tokens(8, anatomy(model).vocabulary)]), cache=cache))
        size = sum(int(array.nbytes) for array in caches.arrays_in(cache)) // 8
        note(model, cache_bytes=size)
    weights = sum(int(p.nbytes) for p in flat_parameters(model).values())
    room = int(_SHARE * (device_info().memory_total - weights))
    return max(ROWS, min(MOST_ROWS, room // max(1, size * tokens)))


class Batches:
    """Prompts in right-padded batches of similar length, the longest first: memory peaks at once.

    `skip` tokens of each are left off. Without `batch_size` a batch holds at most `budget` tokens
    and `most` rows. `tight` ends a batch that is large enough before a row that would be padding
    for a fifth or more: right for one pass over the prompts, wrong for generation, where every
    batch is decoded step by step. Raises InputError for an empty prompt and a size below 1.
    """

    def __init__(
        self,
        token_lists: Sequence[Sequence[int]],
        *,
        skip: int = 0,
        batch_size: int | None = None,
        equal_lengths: bool = False,
        budget: int = TOKEN_BUDGET,
        most: int = ROWS,
        tight: bool = False,
    ) -> None:
        if any(len(t) == 0 for t in token_lists):
            empty = next(i for i, t in enumerate(token_lists) if not t)
            raise InputError(f"prompt {empty} has no tokens")
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected at least 1, or None")
        self._lists = [list(tokens[skip:]) for tokens in token_lists]
        self._waiting = sorted(range(len(self._lists)), key=lambda i: -len(self._lists[i]))
        self._batch_size, self._budget, self._most = batch_size, budget, most
        self._equal_lengths, self._tight = equal_lengths, tight and batch_size is None

    def __iter__(self) -> Iterator[Batch]:
        """The batches that are left, each as large as it may be."""
        while self._waiting:
            yield self.take(self.size())

    @property
    def waiting(self) -> int:
        """Prompts that are in no batch yet."""
        return len(self._waiting)

    def size(self) -> int:
        """Rows that a batch of the next prompts may hold."""
        width = len(self._lists[self._waiting[0]])
        return self._batch_size or max(1, min(self._most, self._budget // max(width, 1)))

    def take(self, rows: int) -> Batch:
        """The next batch, of at most so many rows."""
        chosen = self._waiting[:rows]
        width = len(self._lists[chosen[0]])
        if self._equal_lengths:
            chosen = [i for i in chosen if len(self._lists[i]) == width]
        elif self._tight:
            full = [k * width >= _LARGE_ENOUGH for k in range(len(chosen))]
            short = [len(self._lists[i]) <= _TIGHT * width for i in chosen]
            ends = (k for k, both in enumerate(zip(full, short, strict=True)) if all(both))
            chosen = chosen[: next(ends, len(chosen))]
        del self._waiting[: len(chosen)]
        padded = [self._lists[i] + [0] * (width - len(self._lists[i])) for i in chosen]
        return Batch(chosen, mx.array(padded), [len(self._lists[i]) for i in chosen])


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
    # Computed here, so that it is not computed again for every batch.
    mx.eval(caches.arrays_in(cache))
    return cache


def repeated(cache: list[Any] | None, rows: int) -> list[Any] | None:
    """A copy of the cache of one prompt for `rows` rows; the original stays as it is."""
    return None if cache is None else caches.repeated(cache, rows)


def can_skip_blocks(model: nn.Module) -> bool:
    """Whether blocks hand on one plain array, so that the stream can enter at any block."""
    check = verify_forward(model)
    plain = not any(notes(model).extras) and not several_streams(model)
    return check.path == "manual" and plain and family_of(model) not in LOOPS


def entering(model: nn.Module, start: int, stream: mx.array | None) -> AbstractContextManager[None]:
    """Blocks before `start` compute nothing; the stream enters block `start` as `stream`.

    Right where `can_skip_blocks`. What those blocks keep in a cache stays as it is.
    """
    layers = anatomy(model).layers[:start]
    return swapped(around(layer, lambda inner, *args, **kwargs: stream) for layer in layers)


class SharedPrefix:
    """The tokens that all prompts begin with, read once per change and kept for the last one.

    Readers of several sets may share one: under one change they then read the prefix once.
    """

    def __init__(
        self, model: nn.Module, token_lists: Sequence[Sequence[int]], *, record: bool
    ) -> None:
        length = 0
        if len(token_lists) > 1 and can_share(model):
            length = shared_prefix(token_lists)
        self.tokens = list(token_lists[0][:length])
        self.recorded = record and can_skip_blocks(model) and _fits(model, length)
        self._model = model
        self._stream: mx.array | None = None
        self._last: tuple[tuple[Intervention, ...], int] = ((), 0)
        self._unchanged = self._run((), 0) if length else None
        self._changed = self._unchanged

    def read(self, interventions: Sequence[Intervention], start: int) -> list[Any] | None:
        """The cache behind the prefix under a change from block `start` on; None when empty."""
        wanted = (tuple(interventions), start)
        if self._unchanged is not None and wanted != self._last:
            self._changed = self._run(wanted[0], start)
            self._last = wanted
        return self._changed

    def _run(self, interventions: Sequence[Intervention], start: int) -> list[Any]:
        cache = make_prompt_cache(self._model)
        stream = self._stream[:, start] if start and self._stream is not None else None
        first = self.recorded and self._stream is None
        with entering(self._model, start if stream is not None else 0, stream):
            out = forward(
                self._model,
                mx.array([self.tokens]),
                cache=cache,
                positions="all" if first else None,
                interventions=interventions,
                logits=False,
            )
        if first:
            self._stream = out.residual
        if stream is not None:
            assert self._unchanged is not None
            # Untouched blocks keep the keys and values that they had; in the pass above the
            # masks were those of an empty cache.
            cache[:start] = self._unchanged[:start]
        mx.eval([state.state for state in cache], [] if self._stream is None else self._stream)
        return cache


class PromptReader:
    """The logits behind the last token of a fixed set of prompts, under one change after another.

    `logits(interventions, start)` asks the caller for a promise: nothing changes before the input
    of block `start`. `record` keeps the streams that this needs (prompts x tokens x residuals).
    `prefix` is one that the prompts of several readers begin with; default their own.
    """

    def __init__(
        self,
        model: nn.Module,
        token_lists: Sequence[Sequence[int]],
        *,
        record: bool = True,
        batch_size: int | None = None,
        prefix: SharedPrefix | None = None,
    ) -> None:
        if not token_lists:
            raise InputError("no prompts to read; expected at least one")
        self._model = model
        self._prefix = prefix or SharedPrefix(model, token_lists, record=record)
        lists = [list(tokens) for tokens in token_lists]
        skip = len(self._prefix.tokens)
        if any(tokens[:skip] != self._prefix.tokens or len(tokens) == skip for tokens in lists):
            raise InputError(f"not all prompts go on from the shared prefix of {skip} tokens")
        grouped = not can_pad(model)
        self._batches = list(
            Batches(lists, skip=skip, batch_size=batch_size, equal_lengths=grouped, tight=True)
        )
        self._order = mx.array(np.argsort([row for b in self._batches for row in b.rows]))
        tokens = sum(int(b.tokens.size) for b in self._batches)
        self.recorded = record and self._prefix.recorded and _fits(model, tokens)
        self._streams: list[mx.array] = []
        self.residual: mx.array | None = None
        """(n, L+1, d) of each prompt's last token, unchanged; None without `record`."""
        self.baseline = self._first()
        """(n, V) float32 logits of the unchanged model."""

    def logits(self, interventions: Sequence[Intervention] = (), start: int = 0) -> mx.array:
        """(n, V) float32, in the order of the prompts; blocks before `start` are not run."""
        if not shares_prefix(interventions):
            raise InputError("an intervention on whole prompts cannot share a prefix; use forward")
        start = start if self.recorded else 0
        prefix = self._prefix.read(interventions, start)
        rows = []
        for number, batch in enumerate(self._batches):
            stream = self._streams[number][:, start] if start else None
            with entering(self._model, start, stream):
                rows.append(self._read(batch, prefix, interventions)[0])
        return mx.concatenate(rows)[self._order]

    def _first(self) -> mx.array:
        """The unchanged pass: logits, and the streams where they are kept."""
        prefix = self._prefix.read((), 0)
        rows, ends = [], []
        for batch in self._batches:
            logits, out = self._read(batch, prefix, (), "all" if self.recorded else None)
            rows.append(logits)
            if out.residual is not None:
                last = mx.array([n - 1 for n in batch.lengths])[:, None, None, None]
                ends.append(mx.take_along_axis(out.residual, last, axis=2)[:, :, 0])
                self._streams.append(out.residual)
            mx.eval(self._streams, ends)
        if ends:
            self.residual = mx.concatenate(ends)[self._order].astype(mx.float32)
        return mx.concatenate(rows)[self._order]

    def _read(
        self,
        batch: Batch,
        prefix: list[Any] | None,
        interventions: Sequence[Intervention],
        positions: Any = None,
    ) -> tuple[mx.array, ForwardOutput]:
        out = forward(
            self._model,
            batch.tokens,
            lengths=batch.lengths,
            cache=repeated(prefix, len(batch.rows)),
            positions=positions,
            interventions=interventions,
            logits="last",
        )
        assert out.logits is not None
        logits = out.logits[:, 0].astype(mx.float32)
        mx.eval(logits)
        return logits, out


def _fits(model: nn.Module, tokens: int) -> bool:
    """Whether the recorded streams of so many tokens stay small."""
    parts = anatomy(model)
    return tokens * parts.d_model * (parts.n_layers + 1) * 4 <= _RECORD_BYTES
