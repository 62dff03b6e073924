"""One cut after another scored on the same validation prompts, stopped where it cannot win.

Tokens, the shared prefix, the unchanged first tokens and answers are computed once. Knows run-time
changes; knows no space and no sampler.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vauban._common import Progress
from vauban.errors import CheckError, InputError, ModelError
from vauban.evaluation import answer_tokens, is_degenerate, with_answers
from vauban.evaluation.likelihood import sequence_losses
from vauban.evaluation.sequences import Scored
from vauban.interventions import Intervention
from vauban.search.front import dominates
from vauban.search.short_answers import FIRST_PROMPTS, Class, Replies, ShortAnswers

# Each round asks this many times the prompts of the one before: small batches are slow batches.
ROUND_FACTOR = 4


@dataclass(frozen=True)
class Figures:
    """What was measured of a cut before it was stopped or done; the fields are `Trial`'s."""

    refused: float
    over_refused: float | None
    kl: float
    degenerate: float
    state: Literal["complete", "pruned"]
    failed: float
    perplexity: float | None
    prompts: int


_OVERFLOW = Figures(1.0, None, float("inf"), 1.0, "pruned", 1.0, None, 0)


class Scorer:
    """Scores run-time changes on the prompts of `answers`, by `objectives`.

    `seconds` holds where the time went, by the name of what was computed.
    """

    def __init__(self, answers: ShortAnswers, objectives: Sequence[str]) -> None:
        self.answers, self.objectives = answers, tuple(objectives)
        self.seconds: dict[str, float] = defaultdict(float)
        for name, prompts in answers.prompts.items():
            if len(prompts) < FIRST_PROMPTS:
                raise InputError(
                    f"{len(prompts)} {name} validation prompts; the first round of a trial asks "
                    f"{FIRST_PROMPTS}: give at least so many, or three times as many measuring "
                    "prompts, of which a third is held out"
                )
        self._sequences: list[Scored] | None = None
        self._no_cut: tuple[float, ...] | None = None

    def unchanged(self, progress: Progress | None = None) -> Figures:
        """The figures of the unchanged model, which every cut has to beat from then on.

        Raises ModelError where its logits overflow.
        """
        total, done = sum(map(len, self.answers.prompts.values())), 0

        def tell(answered: int) -> None:
            nonlocal done
            done += answered
            if progress:
                progress("unchanged answers", done, total)

        tell(0)
        figures = self._score((), (), tell, ("harmful", "harmless"))
        self._no_cut = self._values(figures)
        return figures

    def _values(self, figures: Figures) -> tuple[float, ...]:
        names = {"refused": figures.failed, "kl": figures.kl,
                 "over_refused": figures.over_refused or 0.0,
                 "perplexity": figures.perplexity or 0.0}  # fmt: skip
        return tuple(names[name] for name in self.objectives)

    def score(
        self,
        change: Sequence[Intervention],
        front: Sequence[tuple[float, ...]],
        answered: Callable[[int], None] | None = None,
    ) -> Figures:
        """The figures of a change; `front` are the objectives of the cuts to beat beside no cut.

        After every round the prompts that are still to come count as answered well. A change that
        even so is dominated is stopped, and what was measured of it is kept. The harmless prompts
        are asked where over-refusal is an objective, and last: the harmful ones may have decided.
        A change under which the logits overflow answers nothing: all of it counts as degenerate, at
        infinite KL. `answered` is called with the number of new answers after every round.
        """
        wanted = "over_refused" in self.objectives
        names: tuple[Class, ...] = ("harmful", "harmless") if wanted else ("harmful",)
        try:
            return self._score(change, front, answered, names)
        except (ModelError, CheckError):
            return _OVERFLOW

    def _score(
        self,
        change: Sequence[Intervention],
        front: Sequence[tuple[float, ...]],
        answered: Callable[[int], None] | None,
        names: Sequence[Class],
    ) -> Figures:
        started = time.monotonic()
        replies = Replies(self.answers.kl(change))
        self._spent("first tokens", started)
        if not np.isfinite(replies.kl):
            return _OVERFLOW
        perplexity = None
        if "perplexity" in self.objectives:
            started = time.monotonic()
            perplexity = self._perplexity(change)
            self._spent("perplexity", started)

        rivals = [*front, *([self._no_cut] if self._no_cut else [])]

        def hopeless() -> bool:
            best = {
                "refused": self._failures(replies) / self._count("harmful"),
                "kl": replies.kl,
                "over_refused": self._refusals(replies, "harmless") / self._count("harmless"),
                "perplexity": perplexity or 0.0,
            }
            values = tuple(best[name] for name in self.objectives)
            return any(dominates(other, values) for other in rivals)

        for name in names:
            for count in _rounds(self._count(name)):
                before = len(replies.texts[name])
                self._ask(replies, change, name, count)
                if answered:
                    answered(count - before)
                if hopeless():
                    return self._figures(replies, perplexity, "pruned")
        return self._figures(replies, perplexity, "complete")

    def _count(self, name: Class) -> int:
        return len(self.answers.prompts[name])

    def _ask(
        self, replies: Replies, change: Sequence[Intervention], name: Class, count: int
    ) -> None:
        started = time.monotonic()
        self.answers.extend([(replies, change)], count, name)
        self._spent("answers", started)

    def _spent(self, name: str, started: float) -> None:
        self.seconds[name] += time.monotonic() - started

    def _refusals(self, replies: Replies, name: Class) -> int:
        return sum(map(self.answers.refusal, replies.texts[name]))

    def _failures(self, replies: Replies) -> int:
        refused: Callable[[str], bool] = self.answers.refusal
        return sum(refused(text) or is_degenerate(text) for text in replies.texts["harmful"])

    def _figures(
        self, replies: Replies, perplexity: float | None, state: Literal["complete", "pruned"]
    ) -> Figures:
        asked = len(replies.texts["harmful"])
        done = len(replies.texts["harmless"]) == self._count("harmless")
        over = self._refusals(replies, "harmless") / self._count("harmless") if done else None
        degenerate = sum(map(is_degenerate, replies.texts["harmful"]))
        return Figures(
            self._refusals(replies, "harmful") / asked, over, replies.kl, degenerate / asked, state,
            self._failures(replies) / asked, perplexity, asked,
        )  # fmt: skip

    def _perplexity(self, change: Sequence[Intervention]) -> float:
        """Of the unchanged model's greedy answers to the harmless prompts, made once."""
        answers = self.answers
        if self._sequences is None:
            prompts: list[Any] = answers.prompts["harmless"]
            ids = answer_tokens(
                answers.model, answers.tokenizer, prompts, max_tokens=answers.max_tokens,
                batch_size=answers.batch_size,
            )  # fmt: skip
            self._sequences = with_answers(answers.tokenizer, prompts, ids)
        losses = sequence_losses(
            answers.model, self._sequences, change, batch_size=answers.batch_size
        )
        return float(np.exp(sum(total for total, _ in losses) / sum(count for _, count in losses)))


def _rounds(most: int) -> list[int]:
    """Prompts after each round: 8, 32, 128, ... and all of them last.

    >>> _rounds(48)
    [8, 32, 48]
    """
    counts, count = [], FIRST_PROMPTS
    while count < most:
        counts.append(count)
        count *= ROUND_FACTOR
    return [*counts, most]
