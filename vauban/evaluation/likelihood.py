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
from vauban.evaluation.sequences import Scored, SequenceReading, answer_ids, with_answers
from vauban.interventions import Intervention
from vauban.models import check_same_vocabulary


@dataclass(frozen=True)
class Likelihood:
    """Over `tokens` scored tokens; `kl` is KL(original || modified), nats per token.

    `first_token_kl` is its mean over the first scored token of every answer.

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
    first_token_kl: float | None = None

    def summary(self) -> str:
        span = "" if self.kl_interval is None else " [{:.4f}, {:.4f}]".format(*self.kl_interval)
        return (
            f"perplexity {self.perplexity_original:.3f} before, {self.perplexity_modified:.3f} "
            f"after; KL {self.kl:.4f}{span} over {self.tokens} tokens"
        )

    def to_dict(self) -> dict[str, Any]:
        return to_plain(self)


def _kl(a: mx.array, b: mx.array) -> mx.array:
    """Σ_v p (log p - log q) over the last axis; a token that p rules out adds nothing."""
    return mx.where(a == -mx.inf, 0.0, mx.exp(a) * (a - b)).sum(-1)


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
    reading = SequenceReading(model, chosen, interventions, batch_size)
    cache = reading.cache(model, interventions)
    for batch in reading.batches:
        columns, mask = reading.scored(batch)
        _, at = reading.logs(model, batch, columns, interventions, cache)
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
    return compare_changes(
        original, [(modified, interventions)], sequences, batch_size=batch_size, progress=progress
    )[0]


def compare_changes(
    original: nn.Module,
    changed: Sequence[tuple[nn.Module, Iterable[Intervention]]],
    sequences: Sequence[Scored],
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> list[Likelihood]:
    """As `compare_sequences`, for several (model, interventions); the original is read once."""
    for model, _ in changed:
        check_same_vocabulary(original, model, "KL")
    kept = [s for s in sequences if len(s.ids) > s.start]
    if not kept:
        raise InputError("no tokens to score: all answers are empty")
    sides = [(original, ()), *((model, tuple(changes)) for model, changes in changed)]
    every = [change for _, changes in sides for change in changes]
    reading = SequenceReading(original, kept, every, batch_size)
    caches = [reading.cache(*side) for side in sides]
    # Of each side: loss, KL and KL of the first token, one number a sequence.
    sums: list[list[list[float]]] = [[[], [], []] for _ in sides]
    counts: list[int] = []
    for batch in reading.batches:
        columns, mask = reading.scored(batch)
        terms: list[tuple[mx.array, ...]] = []
        for side, cache in zip(sides, caches, strict=True):
            logs, at = reading.logs(side[0], batch, columns, side[1], cache)
            if not terms:
                before = logs
            divergence = mx.where(mask, _kl(before, logs), 0) if terms else mx.zeros_like(at)
            # One sum per sequence: the intervals draw sequences.
            loss = mx.where(mask, -at, 0).sum(axis=1)
            terms.append((loss, divergence.sum(axis=1), divergence[:, 0]))
            mx.eval(terms[-1])
        for kinds, values in zip(sums, terms, strict=True):
            for kind, numbers in zip(kinds, values, strict=True):
                kind += floats(numbers)
        counts += integers(mask.sum(axis=1))
        if progress:
            progress("score", len(counts), len(kept))
    losses = [_number(v, "the original model") for v in sums[0][0]]
    return [
        _likelihood(losses, [[_number(v, "the modified model") for v in k] for k in kinds], counts)
        for kinds in sums[1:]
    ]


def _likelihood(
    before: Sequence[float], changed: Sequence[Sequence[float]], counts: Sequence[int]
) -> Likelihood:
    """Means over tokens with their intervals; `changed` are losses, KL and the first tokens' KL."""
    after, kl, first = changed
    count = sum(counts)
    return Likelihood(
        exponential(sum(before) / count),
        exponential(sum(after) / count),
        max(sum(kl) / count, 0.0),
        count,
        _interval(before, counts, exponential),
        _interval(after, counts, exponential),
        _interval(kl, counts, lambda mean: max(mean, 0.0)),
        max(sum(first) / len(first), 0.0),
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
    ids = [answer_ids(tokenizer, a) for a in answers]
    sequences = with_answers(tokenizer, prompts, ids)
    return compare_sequences(
        model, model, sequences, interventions, batch_size=batch_size, progress=progress
    )


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
