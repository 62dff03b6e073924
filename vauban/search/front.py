"""What a trial is, and which trials no other one beats: the front.

Knows figures; knows no model and no sampler.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vauban._results import to_plain
from vauban.errors import CheckError, InputError
from vauban.search.short_answers import cost

OBJECTIVES = ("refused", "kl", "over_refused", "perplexity")
# The first-token KL that weighs as much as a tenth of the answers refused, where none is given.
KL_LIMIT = 0.1
_WORDS = {
    "refused": "refused or degenerate", "kl": "first-token KL", "over_refused": "over-refused",
    "perplexity": "perplexity",
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """What a cut did to the validation prompts.

    number        the trial's place in the search; 0 is the default cut
    parameters    the point of the `SearchSpace`
    refused       share of harmful prompts that were refused
    over_refused  share of harmless prompts that were refused; None of a trial that was stopped
    kl            first-token KL on all harmless prompts, nats
    degenerate    share of the answers to harmful prompts that are empty or loop
    failed        share of harmful prompts refused or answered degenerately: the objective "refused"
    perplexity    of the unchanged answers to harmless prompts; None where it was not asked for
    prompts       harmful prompts that were answered
    state         "complete", or "pruned": stopped because it could no longer join the front

    >>> trial = Trial(0, {"residual": 4}, 0.25, 0.0, 0.02, 0.0, "complete", 0.25, None, 16)
    >>> trial.values(("refused", "kl")), round(trial.cost(kl_limit=0.1), 3)
    ((0.25, 0.02), 0.27)
    """

    number: int
    parameters: Mapping[str, Any]
    refused: float
    over_refused: float | None
    kl: float
    degenerate: float
    state: Literal["complete", "pruned"]
    failed: float
    perplexity: float | None
    prompts: int

    def values(self, objectives: Sequence[str]) -> tuple[float, ...]:
        """The figures of these objectives, smaller is better; 0 for one that was not measured."""
        figures = {"refused": self.failed, "kl": self.kl, "over_refused": self.over_refused,
                   "perplexity": self.perplexity}  # fmt: skip
        return tuple(float(figures[name] or 0.0) for name in objectives)

    def cost(self, kl_limit: float = KL_LIMIT) -> float:
        """The rule of `choose_by_answers`: smaller is better."""
        return cost(self.refused, self.degenerate, self.over_refused or 0.0, self.kl / kl_limit)

    def summary(self) -> str:
        over = "" if self.over_refused is None else f", over-refused {self.over_refused:.1%}"
        return (
            f"trial {self.number}: refused {self.refused:.1%} of {self.prompts}{over}, first-token "
            f"KL {self.kl:.4f}, degenerate {self.degenerate:.1%} ({self.state})"
        )

    def to_dict(self) -> dict[str, Any]:
        return to_plain(self)


def check_objectives(objectives: Iterable[str]) -> tuple[str, ...]:
    """The objectives as a tuple: refused, KL, and what was asked for beside them.

    >>> check_objectives(["over_refused"])
    ('refused', 'kl', 'over_refused')
    """
    chosen = [objectives] if isinstance(objectives, str) else list(objectives)
    wrong = [name for name in chosen if name not in OBJECTIVES]
    if wrong:
        raise InputError(f"objectives {wrong}; expected some of {', '.join(OBJECTIVES)}")
    return tuple(name for name in OBJECTIVES if name in ("refused", "kl", *chosen))


def dominates(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether the first is at least as good in everything and better in something.

    >>> dominates((0.0, 0.1), (0.1, 0.1)), dominates((0.0, 0.1), (0.0, 0.1))
    (True, False)
    """
    pairs = list(zip(first, second, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def front_of(trials: Iterable[Trial], objectives: Sequence[str]) -> tuple[Trial, ...]:
    """The complete trials that no other one dominates, by their figures; of equals the first."""
    front: list[Trial] = []
    for trial in sorted(
        (t for t in trials if t.state == "complete"), key=lambda t: (t.values(objectives), t.number)
    ):
        values = trial.values(objectives)
        others = [other.values(objectives) for other in front]
        # In this order nothing that comes later can dominate what came before.
        if values not in others and not any(dominates(other, values) for other in others):
            front.append(trial)
    return tuple(front)


def best_of(front: Sequence[Trial], kl_limit: float | None) -> Trial:
    """The cheapest trial by the rule of the choices; with a limit, of those that keep it.

    With a limit the least refused one counts first, then the rule. Raises CheckError where no trial
    keeps it, naming the nearest, and where the front is empty.
    """
    if not front:
        raise CheckError("no trial beats the unchanged model; give the search more time or trials")
    if kl_limit is None:
        return min(front, key=lambda t: (t.cost(), t.number))
    if not kl_limit > 0:
        raise InputError(f"kl_limit is {kl_limit}; expected a KL above 0")
    within = [trial for trial in front if trial.kl <= kl_limit]
    if not within:
        near = min(front, key=lambda t: (t.kl, t.number))
        raise CheckError(
            f"no trial keeps the first-token KL at {kl_limit:g} or below; the nearest is "
            f"{near.summary()}. Raise the limit, or go on with more trials"
        )
    return min(within, key=lambda t: (t.failed, t.cost(kl_limit), t.number))


def describe_front(objectives: Sequence[str]) -> str:
    """The objectives in words."""
    return ", ".join(_WORDS[name] for name in objectives)
