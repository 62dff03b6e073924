"""Perplexity of texts and answered requests, with its interval, under run-time interventions.

Knows what is scored of a text (Arditi et al. 2024, section 4 and their code); `likelihood` computes
the losses, `vauban.prompts.load_texts` reads the texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.nn as nn

from vauban._common import Progress
from vauban._results import to_plain
from vauban.errors import InputError
from vauban.evaluation.intervals import bootstrap_interval
from vauban.evaluation.likelihood import exponential, sequence_losses
from vauban.evaluation.sequences import scored_entry
from vauban.interventions import Intervention

MAX_LENGTH = 256
RESAMPLES = 2000


@dataclass(frozen=True)
class TextPerplexity:
    """`cross_entropy` in nats per token over `tokens` scored tokens of `texts` texts.

    `perplexity` is its exponential. The intervals are 95 % percentile bootstraps that draw texts
    (`method` says so); None for a single text. `losses` holds (summed loss, tokens) of each text
    that was scored; `skipped` counts texts too short to score a token of.
    """

    name: str
    cross_entropy: float
    perplexity: float
    tokens: int
    texts: int
    skipped: int
    interval: tuple[float, float] | None
    method: str
    losses: list[tuple[float, int]] = field(repr=False)

    @property
    def perplexity_interval(self) -> tuple[float, float] | None:
        if self.interval is None:
            return None
        low, high = self.interval
        return exponential(low), exponential(high)

    def summary(self) -> str:
        pair = self.perplexity_interval
        span = "" if pair is None else " [{:.4g}, {:.4g}]".format(*pair)
        skipped = f", {self.skipped} too short" if self.skipped else ""
        return (
            f"perplexity of {self.name}: {self.perplexity:.4g}{span} ({self.tokens} tokens, "
            f"{self.texts} texts{skipped})"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**to_plain(self), "perplexity_interval": to_plain(self.perplexity_interval)}


def measure_perplexity(
    model: nn.Module,
    tokenizer: Any,
    texts_or_chats: Sequence[Any],
    *,
    interventions: Iterable[Intervention] = (),
    name: str = "texts",
    max_length: int | None = MAX_LENGTH,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> TextPerplexity:
    """Token-weighted perplexity of texts and chats from float32 log-softmax, with an interval.

    A text is cut to `max_length` tokens, special tokens included; its first token is not scored.
    Of a chat exactly the tokens of the last answer are scored, the first of them predicted from
    the template's last token; no end-of-turn token is scored and chats are not cut. This is the
    mask of Arditi et al. 2024 (arXiv 2406.11717). `load_texts` reads the entries, for example
    `load_texts("plain")`.

    A text is read in one pass as a prompt is: `Add` at "prompt" positions and `Conditional` see
    all of its tokens as the prompt.

    Raises InputError when there is no token to score, CheckError when the model's logits are NaN.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> measured = vauban.measure_perplexity(model, tokenizer, ["The sky is blue.", "A red hat."])
    >>> low, high = measured.perplexity_interval
    >>> 1 < low <= measured.perplexity <= high
    True
    """
    if max_length is not None and max_length < 2:
        raise InputError(f"max_length is {max_length}; expected at least 2, or None")
    sequences = [
        scored_entry(tokenizer, entry, f"entry {number}", max_length)
        for number, entry in enumerate(texts_or_chats)
    ]
    every = sequence_losses(
        model, sequences, interventions, batch_size=batch_size, progress=progress
    )
    losses = [(total, count) for total, count in every if count]
    if not losses:
        raise InputError(f"{name}: no tokens to score; give texts of at least two tokens")
    totals, counts = zip(*losses, strict=True)
    mean = sum(totals) / sum(counts)
    interval = None
    method = "no interval: one text"
    if len(losses) > 1:
        interval = bootstrap_interval(totals, counts, resamples=RESAMPLES, seed=seed)
        method = f"bootstrap over texts, {RESAMPLES} resamples, seed {seed}"
    return TextPerplexity(
        name, mean, exponential(mean), sum(counts), len(losses), len(every) - len(losses),
        interval, method, losses,
    )  # fmt: skip


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    texts_or_chats: Sequence[Any],
    *,
    interventions: Iterable[Intervention] = (),
    max_length: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> float:
    """exp of the mean negative log-likelihood per token: `measure_perplexity`'s figure alone.

    Texts are scored whole unless `max_length` cuts them.

    Raises InputError for texts of fewer than two tokens, and a `max_length` below 2.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> vauban.perplexity(model, tokenizer, ["The sky is blue."]) > 1
    True
    """
    return measure_perplexity(
        model,
        tokenizer,
        texts_or_chats,
        interventions=interventions,
        max_length=max_length,
        batch_size=batch_size,
        progress=progress,
    ).perplexity
