"""Prompts read once, and read again from the block where a change begins.

A change at block l leaves every residual before l as it was: those blocks are skipped and the
stream enters block l as it was recorded. The prefix that all prompts share is read once per change.
Knows token lists, caches and blocks; knows no scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from vauban.errors import InputError
from vauban.interventions import Intervention, shares_prefix
from vauban.models.anatomy import anatomy
from vauban.models.batching import batches, repeated, shared_prefix
from vauban.models.forward import forward
from vauban.models.notes import notes
from vauban.models.paths import several_streams
from vauban.models.rows import can_pad, can_share
from vauban.models.swap import around, swapped
from vauban.models.verify import verify_forward

# Recorded streams may take this much; beyond it every change is read from the first block.
RECORD_BYTES = 2 * 2**30


def can_resume(model: nn.Module) -> bool:
    """Whether blocks hand on one plain array, so that the stream can enter at any block."""
    check = verify_forward(model)
    plain = not any(notes(model).extras) and not several_streams(model)
    return check.path == "manual" and plain


@contextmanager
def entering(model: nn.Module, start: int, stream: mx.array | None) -> Iterator[None]:
    """Blocks before `start` compute nothing; the stream enters block `start` as `stream`.

    Block 0 has nothing before it: then `stream` may be None.
    """
    layers = anatomy(model).layers[:start]
    with swapped(around(layer, lambda call, *args, **kwargs: stream) for layer in layers):
        yield


class SharedPrefix:
    """The tokens that all prompts begin with, read once per change and kept for the last one.

    Readers of several sets may share one: what is asked of each set under the same change then
    reads the prefix once.
    """

    def __init__(
        self, model: nn.Module, token_lists: Sequence[Sequence[int]], *, record: bool
    ) -> None:
        length = 0
        if len(token_lists) > 1 and can_share(model):
            length = shared_prefix(token_lists)
        self.tokens = list(token_lists[0][:length])
        parts = anatomy(model)
        size = length * parts.d_model * (parts.n_layers + 1) * 4
        self.recorded = record and can_resume(model) and size <= RECORD_BYTES
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
                self._model, mx.array([self.tokens]), cache=cache,
                positions="all" if first else None, interventions=interventions, logits=False,
            )  # fmt: skip
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
            batches(lists, skip=skip, batch_size=batch_size, equal_lengths=grouped, tight=True)
        )
        self._order = mx.array(np.argsort([row for b in self._batches for row in b.rows]))
        parts = anatomy(model)
        tokens = sum(int(b.tokens.size) for b in self._batches)
        size = tokens * parts.d_model * (parts.n_layers + 1) * 4
        self.recorded = record and self._prefix.recorded and size <= RECORD_BYTES
        self._streams: list[mx.array] = []
        self.residual: mx.array | None = None
        """(n, L+1, d) of each prompt's last token, unchanged; None without `record`."""
        self.baseline = self._first()
        """(n, V) float32 logits of the unchanged model."""

    def logits(self, interventions: Sequence[Intervention] = (), start: int = 0) -> mx.array:
        """(n, V) float32, in the order of the prompts; blocks before `start` are not run."""
        if not shares_prefix(interventions):
            raise InputError("a conditional intervention needs whole prompts; use forward")
        start = start if self.recorded else 0
        prefix = self._prefix.read(interventions, start)
        found = []
        for number, batch in enumerate(self._batches):
            stream = self._streams[number][:, start] if start else None
            with entering(self._model, start, stream):
                out = forward(
                    self._model, batch.tokens, lengths=batch.lengths, positions=None,
                    cache=repeated(prefix, len(batch.rows)), interventions=interventions,
                    logits="last",
                )  # fmt: skip
            assert out.logits is not None
            found.append(out.logits[:, 0].astype(mx.float32))
            mx.eval(found[-1])
        return mx.concatenate(found)[self._order]

    def _first(self) -> mx.array:
        """The unchanged pass: logits, and the streams where they are kept."""
        positions: Any = "all" if self.recorded else None
        prefix = self._prefix.read((), 0)
        found, ends = [], []
        for batch in self._batches:
            out = forward(
                self._model, batch.tokens, lengths=batch.lengths, positions=positions,
                cache=repeated(prefix, len(batch.rows)), logits="last",
            )  # fmt: skip
            assert out.logits is not None
            found.append(out.logits[:, 0].astype(mx.float32))
            if out.residual is not None:
                last = mx.array([n - 1 for n in batch.lengths])[:, None, None, None]
                ends.append(mx.take_along_axis(out.residual, last, axis=2)[:, :, 0])
                self._streams.append(out.residual)
            mx.eval(found[-1], self._streams, ends)
        if ends:
            self.residual = mx.concatenate(ends)[self._order].astype(mx.float32)
        return mx.concatenate(found)[self._order]
