"""Sequences with scored tokens, read in batches: the log-probabilities where they count.

Knows models and prompts' tokens; sums nothing up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vauban.errors import InputError
from vauban.generation import Batches, prefix_cache, repeated, shared_prefix
from vauban.generation.batching import Batch
from vauban.interventions import Intervention, shares_prefix
from vauban.models import anatomy, can_pad, can_share, forward
from vauban.prompts import encode_chat

# Logits of a batch are (rows, tokens, vocabulary) in float32; keep them under half a gigabyte.
_LOGIT_BUDGET = 128_000_000


@dataclass(frozen=True, eq=False)
class Scored:
    """A sequence and where its scored tokens start: ids[start:] are scored, each from its past."""

    ids: list[int]
    start: int


def with_answers(
    tokenizer: Any, prompts: Sequence[Any], answers: Sequence[Sequence[int]]
) -> list[Scored]:
    """Prompt and answer ids joined; the answer tokens are scored."""
    joined = []
    for prompt, answer in zip(prompts, answers, strict=True):
        head = encode_chat(tokenizer, prompt)
        joined.append(Scored(head + list(answer), len(head)))
    return joined


def answer_ids(tokenizer: Any, answer: str | Sequence[int]) -> list[int]:
    if isinstance(answer, str):
        return list(tokenizer.encode(answer, add_special_tokens=False))
    return [int(i) for i in answer]


def scored_entry(tokenizer: Any, entry: Any, where: str, max_length: int | None = None) -> Scored:
    """A text, scored from its second token on, or a chat, whose last answer is scored.

    `max_length` cuts a text to that many tokens, special tokens included; chats stay whole.
    """
    if isinstance(entry, str):
        return Scored([int(i) for i in tokenizer.encode(entry)][:max_length], 1)
    if entry and entry[-1].get("role") == "assistant":
        head = encode_chat(tokenizer, list(entry[:-1]))
        return Scored(head + answer_ids(tokenizer, entry[-1]["content"]), len(head))
    raise InputError(f"{where} is neither a text nor a chat that ends with an assistant message")


class SequenceReading:
    """Sequences in batches, read by one model after another behind their shared start.

    The head, which is the dearest matrix of a small model, runs on the scored positions alone.
    """

    def __init__(
        self,
        model: nn.Module,
        sequences: Sequence[Scored],
        changes: Sequence[Intervention],
        batch_size: int | None,
    ) -> None:
        self.sequences = sequences
        self.columns = can_pad(model)
        share = self.columns and len(sequences) > 1 and can_share(model)
        common = 0
        if share and shares_prefix(changes):
            # The token before the first scored one has to be read for its prediction.
            first = min(s.start for s in sequences) - 1
            common = min(shared_prefix([s.ids for s in sequences]), first)
        self.prefix = list(sequences[0].ids[:common])
        width = max(len(s.ids) for s in sequences) - common
        rows = max(1, min(32, _LOGIT_BUDGET // (width * anatomy(model).vocabulary)))
        self.batches = list(
            Batches([s.ids for s in sequences], skip=common, batch_size=batch_size or rows)
        )

    def cache(self, model: nn.Module, interventions: Sequence[Intervention]) -> list[Any] | None:
        """The cache behind the shared start under a change; None where there is none."""
        return prefix_cache(model, self.prefix, interventions)

    def scored(self, batch: Batch) -> tuple[mx.array, mx.array]:
        """(B, P) columns whose predictions count, and which of them are a row's own."""
        starts = [self.sequences[i].start - 1 - len(self.prefix) for i in batch.rows]
        counts = [n - 1 - start for n, start in zip(batch.lengths, starts, strict=True)]
        steps = mx.arange(max(counts))[None]
        mask = steps < mx.array(counts)[:, None]
        return mx.where(mask, mx.array(starts)[:, None] + steps, 0), mask

    def logs(
        self,
        model: nn.Module,
        batch: Batch,
        columns: mx.array,
        interventions: Sequence[Intervention],
        cache: list[Any] | None,
    ) -> tuple[mx.array, mx.array]:
        """(B, P, V) float32 log-probabilities and (B, P) of the token that comes next."""
        out = forward(
            model,
            batch.tokens,
            lengths=batch.lengths,
            cache=repeated(cache, len(batch.rows)),
            positions=None,
            interventions=interventions,
            logits=columns if self.columns else True,
        )
        assert out.logits is not None
        x = out.logits.astype(mx.float32)
        if not self.columns:
            x = mx.take_along_axis(x, columns[..., None], axis=1)
        total = mx.logsumexp(x, axis=-1, keepdims=True)
        following = mx.take_along_axis(batch.tokens, columns + 1, axis=1)[..., None]
        # Lazy: where only the next token matters, the whole table is never computed.
        return x - total, (mx.take_along_axis(x, following, -1) - total)[..., 0]
