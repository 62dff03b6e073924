"""Perplexity and KL divergence from float32 log-softmax, averaged over tokens.

Teacher-forced over given texts and answers; knows no files. `perplexity` measures sets of texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vauban._arrays import floats, integers
from vauban._common import Progress
from vauban._results import to_plain
from vauban.errors import CheckError, InputError
from vauban.evaluation.behaviour import answer_tokens
from vauban.evaluation.intervals import bootstrap_interval
from vauban.interventions import Intervention
from vauban.models import anatomy, batches, check_same_vocabulary, forward
from vauban.prompts import encode_chat

# Logits of a batch are (rows, tokens, vocabulary) in float32; keep them under half a gigabyte.
_LOGIT_BUDGET = 128_000_000


@dataclass(frozen=True)
class Likelihood:
    """Over `tokens` scored tokens; `kl` is KL(original || modified), nats per token.

    The intervals are 95 % bootstraps that draw answers (2000 resamples, seed 0); None where there
    is one answer, or a figure is infinite.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> cost = vauban.compare_likelihood(model, tokenizer, ["Say hello."] * 2, ["Hello.", "Hi."])
    >>> cost.kl < 1e-6, cost.perplexity_original == cost.perplexity_modified, cost.tokens > 2
    (True, True, True)
    """

    perplexity_original: float
    perplexity_modified: float
    kl: float
    tokens: int
    perplexity_original_interval: tuple[float, float] | None = None
    perplexity_modified_interval: tuple[float, float] | None = None
    kl_interval: tuple[float, float] | None = None

    def summary(self) -> str:
        span = "" if self.kl_interval is None else " [{:.4f}, {:.4f}]".format(*self.kl_interval)
        return (
            f"perplexity {self.perplexity_original:.3f} before, {self.perplexity_modified:.3f} "
            f"after; KL {self.kl:.4f}{span} over {self.tokens} tokens"
        )

    def to_dict(self) -> dict[str, Any]:
        return to_plain(self)


@dataclass(frozen=True, eq=False)
class Scored:
    """A sequence and where its scored tokens start: ids[start:] are scored, each from its past."""

    ids: list[int]
    start: int


def _kl(a: mx.array, b: mx.array) -> mx.array:
    """Σ_v p (log p - log q) over the last axis; a token that p rules out adds nothing."""
    return mx.where(a == -mx.inf, 0.0, mx.exp(a) * (a - b)).sum(-1)


def _batches(
    model: nn.Module, sequences: Sequence[Scored], batch_size: int | None
) -> Iterable[Any]:
    width = max(len(s.ids) for s in sequences)
    rows = max(1, min(32, _LOGIT_BUDGET // (width * anatomy(model).vocabulary)))
    return batches([s.ids for s in sequences], batch_size=batch_size or rows)


def _mask(sequences: Sequence[Scored], batch: Any) -> mx.array:
    """(B, T-1) of the predictions that count: column t predicts token t + 1."""
    column = mx.arange(batch.tokens.shape[1] - 1)[None]
    start = mx.array([sequences[i].start - 1 for i in batch.rows])[:, None]
    end = mx.array([n - 1 for n in batch.lengths])[:, None]
    return (column >= start) & (column < end)


def _logs(
    model: nn.Module, batch: Any, interventions: Sequence[Intervention]
) -> tuple[mx.array, mx.array]:
    """(B, T-1, V) float32 log-probabilities and (B, T-1) of the token that comes next."""
    out = forward(
        model, batch.tokens, lengths=batch.lengths, positions=None, interventions=interventions
    )
    assert out.logits is not None
    x = out.logits[:, :-1].astype(mx.float32)
    total = mx.logsumexp(x, axis=-1, keepdims=True)
    # Lazy: where only the next token matters, the whole table is never computed.
    return x - total, (mx.take_along_axis(x, batch.tokens[:, 1:, None], -1) - total)[..., 0]


def sequence_losses(
    model: nn.Module,
    sequences: Sequence[Scored],
    interventions: Iterable[Intervention] = (),
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> list[tuple[float, int]]:
    """(summed negative log-likelihood in nats, scored tokens) of each sequence, in their order.

    A sequence with nothing to score gives (0.0, 0). Each is read in one pass, as a prompt is: an
    `Add` at "prompt" positions acts on every token of it. Raises CheckError for NaN.
    """
    interventions = tuple(interventions)
    kept = [i for i, s in enumerate(sequences) if len(s.ids) > s.start]
    losses = [(0.0, 0) for _ in sequences]
    if not kept:
        return losses
    chosen = [sequences[i] for i in kept]
    done = 0
    for batch in _batches(model, chosen, batch_size):
        mask = _mask(chosen, batch)
        _, at = _logs(model, batch, interventions)
        totals, counts = mx.where(mask, -at, 0).sum(axis=1), mask.sum(axis=1)
        mx.eval(totals, counts)
        for row, total, count in zip(batch.rows, floats(totals), integers(counts), strict=True):
            losses[kept[row]] = (_number(total, "the model"), count)
        done += len(batch.rows)
        if progress:
            progress("score", done, len(kept))
    return losses


def _number(value: float, whose: str) -> float:
    """`value` unless it is NaN: a broken model has no likelihood, and none may be invented."""
    if math.isnan(value):
        raise CheckError(
            f"the logits of {whose} are not finite on the scored tokens, so there is no perplexity "
            "and no KL: a weight is NaN, or float16 overflows under this change. Load the model in "
            "float32 or bfloat16, or change it less"
        )
    return value


def compare_sequences(
    original: nn.Module,
    modified: nn.Module,
    sequences: Sequence[Scored],
    interventions: Iterable[Intervention] = (),
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Likelihood:
    """Perplexity of both and KL(original || modified) over the same scored tokens.

    `interventions` act on `modified`. Raises InputError when there is nothing to score and for
    models of different vocabularies, CheckError when the logits of either are NaN.
    """
    check_same_vocabulary(original, modified, "KL")
    interventions = tuple(interventions)
    kept = [s for s in sequences if len(s.ids) > s.start]
    if not kept:
        raise InputError("no tokens to score: all answers are empty")
    losses_a: list[float] = []
    losses_b: list[float] = []
    kls: list[float] = []
    counts: list[int] = []
    for batch in _batches(original, kept, batch_size):
        mask = _mask(kept, batch)
        a, at_a = _logs(original, batch, ())
        b, at_b = _logs(modified, batch, interventions)
        # One sum per sequence: the intervals draw sequences.
        sums = [mx.where(mask, term, 0).sum(axis=1) for term in (-at_a, -at_b, _kl(a, b), mask)]
        mx.eval(sums)
        losses_a += [_number(v, "the original model") for v in floats(sums[0])]
        losses_b += [_number(v, "the modified model") for v in floats(sums[1])]
        kls += [_number(v, "the modified model") for v in floats(sums[2])]
        counts += integers(sums[3])
        if progress:
            progress("score", len(counts), len(kept))
    count = sum(counts)
    return Likelihood(
        exponential(sum(losses_a) / count),
        exponential(sum(losses_b) / count),
        max(sum(kls) / count, 0.0),
        count,
        _interval(losses_a, counts, exponential),
        _interval(losses_b, counts, exponential),
        _interval(kls, counts, lambda mean: max(mean, 0.0)),
    )


def _interval(
    totals: Sequence[float], counts: Sequence[int], scale: Callable[[float], float]
) -> tuple[float, float] | None:
    """The bootstrap interval of Σ totals / Σ counts, both ends through `scale`."""
    if len(totals) < 2 or not all(map(math.isfinite, totals)):
        return None
    low, high = bootstrap_interval(totals, counts)
    return scale(low), scale(high)


def exponential(cross_entropy: float) -> float:
    """Perplexity of a mean loss in nats; kept finite, so that a broken model can be written down.

    >>> exponential(0.0)
    1.0
    """
    return math.exp(min(cross_entropy, 700))


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
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Likelihood:
    """Perplexity and KL of `model` under `interventions` against itself, over given answers.

    Answers are token ids, as `evaluate` keeps them (`EvalResult.answer_tokens`), or texts, which
    are encoded again: where a tokenizer drops a leading space (SentencePiece), other tokens are
    then scored than the model wrote.

    Raises InputError where there is nothing to score, CheckError for logits that are NaN.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> change = vauban.Ablate(mx.ones(128))
    >>> vauban.compare_likelihood(
    ...     model, tokenizer, ["Say hello."], ["Hello."], interventions=[change]
    ... ).kl > 0
    True
    """
    ids = [_answer_ids(tokenizer, a) for a in answers]
    sequences = with_answers(tokenizer, prompts, ids)
    return compare_sequences(
        model, model, sequences, interventions, batch_size=batch_size, progress=progress
    )


def _answer_ids(tokenizer: Any, answer: str | Sequence[int]) -> list[int]:
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
        return Scored(head + _answer_ids(tokenizer, entry[-1]["content"]), len(head))
    raise InputError(f"{where} is neither a text nor a chat that ends with an assistant message")


def kl_divergence(
    model_a: nn.Module,
    model_b: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    interventions: Iterable[Intervention] = (),
    max_tokens: int = 100,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> float:
    """KL(a || b) in nats per token over the tokens of a's greedy answers to `prompts`.

    `interventions` act on b, which may be the same model. `compare_likelihood` gives the interval.

    Raises InputError for other vocabularies and empty answers, CheckError for logits that are NaN.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> vauban.kl_divergence(model, model, tokenizer, ["Say hello."], max_tokens=8) < 1e-6
    True
    """
    check_same_vocabulary(model_a, model_b, "KL")
    answers = answer_tokens(
        model_a, tokenizer, prompts, max_tokens=max_tokens, batch_size=batch_size, progress=progress
    )
    sequences = with_answers(tokenizer, prompts, answers)
    return compare_sequences(
        model_a, model_b, sequences, interventions, batch_size=batch_size, progress=progress
    ).kl
