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
from vauban.models.batching import Batch, batches, repeated, shared_prefix
from vauban.models.forward import forward
from vauban.models.paths import several_streams
from vauban.models.rows import can_pad, can_share
from vauban.models.verify import verify_forward

# Recorded streams may take this much; beyond it every change is read from the first block.
RECORD_BYTES = 2 * 2**30


def can_resume(model: nn.Module) -> bool:
    """Whether blocks hand on one plain array, so that the stream can enter at any block."""
    check = verify_forward(model)
    extras = getattr(model, "_vauban_extras", [1])
    return check.path == "manual" and not any(extras) and not several_streams(model)


@contextmanager
def entering(model: nn.Module, start: int, stream: mx.array) -> Iterator[None]:
    """Blocks before `start` compute nothing; the stream enters block `start` as `stream`."""
    layers = anatomy(model).layers[:start]
    classes = [(layer, type(layer)) for layer in layers]

    def call(self: Any, *args: Any, **kwargs: Any) -> mx.array:
        return stream

    try:
        for layer, cls in classes:
            layer.__class__ = type(f"Skipped{cls.__name__}", (cls,), {"__call__": call})
        yield
    finally:
        for layer, cls in classes:
            layer.__class__ = cls


class PromptReader:
    """The logits behind the last token of a fixed set of prompts, under one change after another.

    `logits(interventions, start)` asks the caller for a promise: nothing changes before the input
    of block `start`. `record` keeps the streams that this needs (prompts x tokens x residuals).
    """

    def __init__(
        self,
        model: nn.Module,
        token_lists: Sequence[Sequence[int]],
        *,
        record: bool = True,
        batch_size: int | None = None,
    ) -> None:
        if not token_lists:
            raise InputError("no prompts to read; expected at least one")
        self._model = model
        self._lists = [list(tokens) for tokens in token_lists]
        self._skip = 0
        if len(self._lists) > 1 and can_share(model):
            self._skip = shared_prefix(self._lists)
        grouped = not can_pad(model)
        self._batches = list(
            batches(self._lists, skip=self._skip, batch_size=batch_size, equal_lengths=grouped)
        )
        self._order = mx.array(np.argsort([row for b in self._batches for row in b.rows]))
        parts = anatomy(model)
        tokens = self._skip + sum(int(b.tokens.size) for b in self._batches)
        size = tokens * parts.d_model * (parts.n_layers + 1) * 4
        self.recorded = record and can_resume(model) and size <= RECORD_BYTES
        self._streams: list[mx.array] = []
        self._prefix_stream: mx.array | None = None
        self._prefix: list[Any] | None = None
        self.residual: mx.array | None = None
        """(n, L+1, d) of each prompt's last token, unchanged; None without `record`."""
        self.baseline = self._first()
        """(n, V) float32 logits of the unchanged model."""

    def logits(self, interventions: Sequence[Intervention] = (), start: int = 0) -> mx.array:
        """(n, V) float32, in the order of the prompts; blocks before `start` are not run."""
        if not shares_prefix(interventions):
            raise InputError("a conditional intervention needs whole prompts; use forward")
        start = start if self.recorded else 0
        prefix = None
        if self._skip:
            prefix = make_prompt_cache(self._model)
            stream = self._prefix_stream[:, start] if start else None  # type: ignore[index]
            self._run(
                mx.array([self._lists[0][: self._skip]]), None, prefix, interventions, start, stream
            )
            if start:
                assert self._prefix is not None
                # Untouched blocks keep the keys and values that they had; in the pass above the
                # masks were those of an empty cache.
                prefix[:start] = self._prefix[:start]
            mx.eval([cache.state for cache in prefix])
        found = []
        for number, batch in enumerate(self._batches):
            stream = self._streams[number][:, start] if start else None
            cache = repeated(prefix, len(batch.rows))
            out = self._run(batch.tokens, batch, cache, interventions, start, stream)
            found.append(out[:, 0].astype(mx.float32))
            mx.eval(found[-1])
        return mx.concatenate(found)[self._order]

    def _run(
        self, tokens: mx.array, batch: Batch | None, cache: list[Any] | None,
        interventions: Sequence[Intervention], start: int, stream: mx.array | None,
    ) -> Any:  # fmt: skip
        """Last logits of a batch, or nothing but a filled cache for the prefix."""
        with entering(self._model, start if stream is not None else 0, stream):  # type: ignore[arg-type]
            return forward(
                self._model, tokens, lengths=None if batch is None else batch.lengths,
                cache=cache, positions=None, interventions=interventions,
                logits=False if batch is None else "last",
            ).logits  # fmt: skip

    def _first(self) -> mx.array:
        """The unchanged pass: logits, and the streams where they are kept."""
        positions: Any = "all" if self.recorded else None
        if self._skip:
            self._prefix = make_prompt_cache(self._model)
            out = forward(
                self._model, mx.array([self._lists[0][: self._skip]]), cache=self._prefix,
                positions=positions, logits=False,
            )  # fmt: skip
            self._prefix_stream = out.residual
            mx.eval([cache.state for cache in self._prefix])
        found, ends = [], []
        for batch in self._batches:
            out = forward(
                self._model, batch.tokens, lengths=batch.lengths, positions=positions,
                cache=repeated(self._prefix, len(batch.rows)), logits="last",
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
