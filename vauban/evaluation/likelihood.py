"""Perplexity and KL divergence from float32 log-softmax, averaged over tokens.

Teacher-forced over given answers; generates nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vauban.errors import InputError
from vauban.evaluation.behaviour import answer_tokens
from vauban.interventions import Intervention
from vauban.models import anatomy, batches, forward
from vauban.prompts import encode_chat

# Logits of a batch are (rows, tokens, vocabulary) in float32; keep them under half a gigabyte.
_LOGIT_BUDGET = 128_000_000


@dataclass(frozen=True)
class Likelihood:
    """Over `tokens` scored tokens; `kl` is KL(original || modified), nats per token."""

    perplexity_original: float
    perplexity_modified: float
    kl: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Scored:
    """A sequence and where its scored tokens start: ids[start:] are scored, each from its past."""

    ids: list[int]
    start: int


def _log_softmax(logits: mx.array) -> mx.array:
    x = logits.astype(mx.float32)
    return x - mx.logsumexp(x, axis=-1, keepdims=True)


def _kl(a: mx.array, b: mx.array) -> mx.array:
    """Σ_v p (log p - log q) over the last axis; a token that p rules out adds nothing."""
    return mx.where(a == -mx.inf, 0.0, mx.exp(a) * (a - b)).sum(-1)


def _batches(model: nn.Module, sequences: Sequence[Scored]) -> Iterable[Any]:
    width = max(len(s.ids) for s in sequences)
    rows = max(1, min(32, _LOGIT_BUDGET // (width * anatomy(model).vocabulary)))
    return batches([s.ids for s in sequences], batch_size=rows)


def _mask(sequences: Sequence[Scored], batch: Any) -> mx.array:
    """(B, T-1) of the predictions that count: column t predicts token t + 1."""
    column = mx.arange(batch.tokens.shape[1] - 1)[None]
    start = mx.array([sequences[i].start - 1 for i in batch.rows])[:, None]
    end = mx.array([n - 1 for n in batch.lengths])[:, None]
    return (column >= start) & (column < end)


def compare(
    original: nn.Module,
    modified: nn.Module,
    sequences: Sequence[Scored],
    interventions: Iterable[Intervention] = (),
) -> Likelihood:
    """Perplexity of both and KL(original || modified) over the same scored tokens.

    `interventions` act on `modified`. Raises InputError when nothing is left to score.
    """
    interventions = tuple(interventions)
    kept = [s for s in sequences if len(s.ids) > s.start]
    if not kept:
        raise InputError("no tokens to score: all answers are empty")
    nll_a = nll_b = kl = 0.0
    count = 0
    for batch in _batches(original, kept):
        mask = _mask(kept, batch)
        target = batch.tokens[:, 1:, None]
        logs = []
        for model, changes in ((original, ()), (modified, interventions)):
            out = forward(
                model, batch.tokens, lengths=batch.lengths, positions=None, interventions=changes
            )
            assert out.logits is not None
            logs.append(_log_softmax(out.logits[:, :-1]))
        a, b = logs
        total_a, total_b, total_kl, n = (
            mx.where(mask, -mx.take_along_axis(a, target, -1)[..., 0], 0).sum(),
            mx.where(mask, -mx.take_along_axis(b, target, -1)[..., 0], 0).sum(),
            mx.where(mask, _kl(a, b), 0).sum(),
            mask.sum(),
        )
        mx.eval(total_a, total_b, total_kl, n)
        nll_a += float(total_a)
        nll_b += float(total_b)
        kl += float(total_kl)
        count += int(n)
    return Likelihood(
        math.exp(min(nll_a / count, 700)),
        math.exp(min(nll_b / count, 700)),
        max(kl / count, 0.0),
        count,
    )


def with_answers(
    tokenizer: Any, prompts: Sequence[Any], answers: Sequence[Sequence[int]]
) -> list[Scored]:
    """Prompt and answer ids joined; the answer tokens are scored."""
    joined = []
    for prompt, answer in zip(prompts, answers, strict=True):
        head = encode_chat(tokenizer, prompt)
        joined.append(Scored(head + list(answer), len(head)))
    return joined


def compare_likelihood(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Any],
    answers: Sequence[str | Sequence[int]],
    *,
    interventions: Iterable[Intervention] = (),
) -> Likelihood:
    """Perplexity and KL of `model` under `interventions` against itself, over given answers."""
    ids = [_answer_ids(tokenizer, a) for a in answers]
    return compare(model, model, with_answers(tokenizer, prompts, ids), interventions)


def _answer_ids(tokenizer: Any, answer: str | Sequence[int]) -> list[int]:
    if isinstance(answer, str):
        return list(tokenizer.encode(answer, add_special_tokens=False))
    return [int(i) for i in answer]


def perplexity(model: nn.Module, tokenizer: Any, texts_or_chats: Sequence[Any]) -> float:
    """exp of the mean negative log-likelihood per token, float32 log-softmax.

    A string is scored from its second token on (special tokens are added and not scored). A chat
    is a list of messages that ends with the assistant's: only that answer is scored, the template
    before it is the context.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> vauban.perplexity(model, tokenizer, ["The sky is blue."]) > 1
    True
    """
    sequences = []
    for number, entry in enumerate(texts_or_chats):
        if isinstance(entry, str):
            ids = list(tokenizer.encode(entry))
            sequences.append(Scored(ids, 1))
        elif entry and entry[-1].get("role") == "assistant":
            head = encode_chat(tokenizer, list(entry[:-1]))
            answer = _answer_ids(tokenizer, entry[-1]["content"])
            sequences.append(Scored(head + answer, len(head)))
        else:
            raise InputError(
                f"entry {number} is neither a text nor a chat that ends with an assistant message"
            )
    if not sequences:
        raise InputError("no texts to score")
    return compare(model, model, sequences).perplexity_original


def kl_divergence(
    model_a: nn.Module,
    model_b: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    max_tokens: int = 64,
) -> float:
    """KL(a || b) in nats per token, over the tokens of a's own greedy answers to `prompts`."""
    answers = answer_tokens(model_a, tokenizer, prompts, max_tokens=max_tokens)
    return compare(model_a, model_b, with_answers(tokenizer, prompts, answers)).kl
