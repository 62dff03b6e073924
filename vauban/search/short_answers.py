"""What a model says under one change after another: first tokens and short greedy answers.

The choice of a direction and the choice of its strength both ask the same validation prompts again
and again; tokens, the shared prefix and the unchanged logits are computed once. Knows models and
prompts; knows no candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import mlx.nn as nn
import numpy as np

from vauban._common import Progress
from vauban.directions.refusal_odds import last_token_kl, refusal_log_odds, refusal_token_ids
from vauban.errors import InputError
from vauban.evaluation import answer_groups, answer_texts, is_degenerate, is_refusal
from vauban.generation import PromptReader, SharedPrefix
from vauban.interventions import Intervention
from vauban.prompts import encode_chat

Refusal = Callable[[str], bool]
Class = Literal["harmful", "harmless"]
# Prompts of each class in the cheap pass over all candidates, and in the first round of answers.
FIRST_PROMPTS = 8
# What a KL at its limit weighs against answers: a tenth of them refused. At a quarter, a model that
# refuses 66 % went on refusing 20 % (Qwen2.5-Coder-0.5B-Instruct), at a KL that was no loss.
KL_WEIGHT = 0.1
# Changes that answer all prompts: among 16 prompts chance decides between neighbours.
FINALISTS = 3


def cost(refused: float, degenerate: float, over_refused: float, excess: float) -> float:
    """The rule of every choice by answers: shares of answers, and `excess`, KL over its limit.

    No limit forbids: a steeper price beyond it prefers, on Qwen2.5-Coder-0.5B-Instruct, a cut
    that leaves 41 % of the refusals (KL .014) to one that leaves none (KL .15).
    """
    return refused + degenerate + over_refused + KL_WEIGHT * excess


def expected_cost(odds: float, excess: float) -> float:
    """The same by first tokens alone: the refusal's probability stands for the share refused.

    >>> round(expected_cost(0.0, 1.0), 3)
    0.6
    """
    return cost(1.0 / (1.0 + math.exp(min(-odds, 700.0))), 0.0, 0.0, excess)


def affordable(kl: Mapping[Any, float], kl_limit: float) -> list[Any]:
    """The changes whose KL alone costs less than refusals that all stay; all where none does."""
    kept = [key for key in kl if cost(0.0, 0.0, 0.0, kl[key] / kl_limit) < 1.0]
    return kept or list(kl)


def halving(candidates: int, prompts: int, most: int) -> list[tuple[int, int]]:
    """(candidates, prompts of each class) of every round of successive halving.

    `FINALISTS` of them answer all prompts in the last round.
    """
    rounds = []
    while candidates > FINALISTS and prompts < most:
        rounds.append((candidates, prompts))
        candidates, prompts = max(FINALISTS, candidates // 2), min(most, 2 * prompts)
    return [*rounds, (candidates, most)]


@dataclass(eq=False)
class Replies:
    """A candidate's answers so far, and its KL on the harmless prompts (first token, nats)."""

    kl: float
    texts: dict[Class, list[str]] = field(default_factory=lambda: {"harmful": [], "harmless": []})

    def rates(self, refusal: Refusal, prompts: int) -> dict[str, float]:
        """Shares over the first `prompts` answers of each class; 0 of a class that is not asked."""

        def share(name: Class, rule: Refusal) -> float:
            texts = self.texts[name][:prompts]
            return sum(map(rule, texts)) / len(texts) if texts else 0.0

        return {
            "refused": share("harmful", refusal),
            "degenerate": share("harmful", is_degenerate),
            "over_refused": share("harmless", refusal),
            "kl": self.kl,
        }


class ShortAnswers:
    """Validation prompts of both classes, put to a model under changes.

    The prompts are shuffled with `seed`. `refusal(text) -> bool` replaces `is_refusal`. Raises
    InputError for fewer than two prompts of a class.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        harmful: Sequence[Any],
        harmless: Sequence[Any],
        *,
        max_tokens: int,
        refusal: Refusal | None = None,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> None:
        for name, prompts in (("harmful", harmful), ("harmless", harmless)):
            if len(prompts) < 2:
                raise InputError(
                    f"{len(prompts)} {name} validation prompts; answers are compared on at least 2"
                )
        random = np.random.default_rng(seed)
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        self.refusal, self.batch_size = refusal or is_refusal, batch_size
        self.prompts: dict[Class, list[Any]] = {
            "harmful": [harmful[i] for i in random.permutation(len(harmful))],
            "harmless": [harmless[i] for i in random.permutation(len(harmless))],
        }
        first, second = (
            [encode_chat(tokenizer, prompt) for prompt in self.prompts[name]]
            for name in ("harmful", "harmless")
        )
        prefix = SharedPrefix(model, [*first, *second], record=False)
        few = first[:FIRST_PROMPTS]
        self._few_harmful = len(few)
        few += second[:FIRST_PROMPTS]
        self._few = PromptReader(model, few, record=False, batch_size=batch_size, prefix=prefix)
        self._harmless = PromptReader(
            model, second, record=False, batch_size=batch_size, prefix=prefix
        )

    @property
    def most(self) -> int:
        """How many prompts of each class the last round asks."""
        return min(map(len, self.prompts.values()))

    def refusal_ids(self) -> tuple[int, ...]:
        """The tokens that begin a refusal; InputError where the tokenizer has none."""
        return refusal_token_ids(self.tokenizer)

    def first_tokens(
        self, change: Sequence[Intervention], ids: tuple[int, ...]
    ) -> tuple[float, float]:
        """Refusal log-odds on a few harmful prompts, and KL on a few harmless ones, in one pass.

        Means over the prompts; the log-odds are 0 where `ids` holds no token.
        """
        n, after = self._few_harmful, self._few.logits(change)
        odds = float(refusal_log_odds(after[:n], ids).mean()) if ids else 0.0
        return odds, float(last_token_kl(self._few.baseline[n:], after[n:]).mean())

    def kl(self, change: Sequence[Intervention]) -> float:
        """Mean KL(unchanged || change) of the first token on harmless prompts, in nats."""
        return float(last_token_kl(self._harmless.baseline, self._harmless.logits(change)).mean())

    def extend(
        self,
        asked: Sequence[tuple[Replies, Sequence[Intervention]]],
        count: int,
        *names: Class,
        progress: Progress | None = None,
    ) -> None:
        """Answer those of the first `count` prompts of the named classes that are not answered.

        All changes are asked together: their rows share batches.
        """
        fresh = [
            {name: self.prompts[name][len(replies.texts[name]) : count] for name in names}
            for replies, _ in asked
        ]
        groups = [
            (change, [prompt for name in names for prompt in new[name]])
            for (_, change), new in zip(asked, fresh, strict=True)
        ]
        every = answer_groups(
            self.model, self.tokenizer, groups, max_tokens=self.max_tokens,
            batch_size=self.batch_size, progress=progress,
        )  # fmt: skip
        for (replies, _), (_, prompts), new, ids in zip(asked, groups, fresh, every, strict=True):
            texts = iter(answer_texts(self.tokenizer, prompts, ids))
            for name in names:
                replies.texts[name] += [next(texts) for _ in new[name]]

    def rounds(
        self,
        changes: Mapping[Any, Sequence[Intervention]],
        kl: Mapping[Any, float],
        cost_of: Callable[[Any, dict[str, float], int], tuple[Any, ...]],
        stage: str,
        progress: Progress | None,
    ) -> list[tuple[Any, int, dict[str, float]]]:
        """Successive halving: (key, prompts, rates) of every change, the best first.

        The last round asks harmless prompts for answers as well, and takes the KL over all of them;
        before it that is `kl`, over a few. `cost_of(key, rates, prompts)` orders the changes of a
        round; those that went further come before those that did not.
        """
        replies = {key: Replies(kl[key]) for key in changes}
        standing = [(key, 0, {"kl": r.kl}) for key, r in replies.items()]
        plan = halving(len(changes), min(FIRST_PROMPTS, self.most), self.most)
        # The last round asks the harmless prompts as well.
        counts = [0, *(prompts for _, prompts in plan)]
        work = [n * (new - old) for (n, _), old, new in zip(plan, counts, counts[1:], strict=False)]
        total, done = sum(work) + plan[-1][0] * self.most, 0

        def tell(label: str, answered: int, _: int) -> None:
            if progress:
                progress(stage, done + answered, total)

        for number, (going_on, prompts) in enumerate(plan):
            last = number == len(plan) - 1
            names: tuple[Class, ...] = ("harmful", "harmless") if last else ("harmful",)
            keys = [key for key, _, _ in standing[:going_on]]
            if last:
                for key in keys:
                    replies[key].kl = self.kl(changes[key])
            asked = [(replies[key], changes[key]) for key in keys]
            self.extend(asked, prompts, *names, progress=tell)
            done += work[number] + (going_on * self.most if last else 0)
            rows = [(key, prompts, replies[key].rates(self.refusal, prompts)) for key in keys]
            standing[:going_on] = sorted(rows, key=lambda row: cost_of(*_turn(row)))
            tell("", 0, 0)
        return standing


def _turn(row: tuple[Any, int, dict[str, float]]) -> tuple[Any, dict[str, float], int]:
    key, prompts, rates = row
    return key, rates, prompts
