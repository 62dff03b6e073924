"""Choose how much is cut where: strength kernels per component, by first tokens and short answers.

Strength 1 in every writer is the surest cut and the dearest one. The cheap scores of a few dozen
shapes shortlist; answers decide, as for the direction. Knows plans at run time; writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import mlx.nn as nn

from vauban._common import RELATIVE_NOISE, Progress
from vauban._results import to_plain
from vauban.edits import EditPlan, plan_cut
from vauban.edits.embedding import EmbeddingMode, is_tied
from vauban.errors import InputError
from vauban.models import anatomy
from vauban.search.answers import concessions, first_tokens
from vauban.search.kernel import StrengthKernel
from vauban.search.short_answers import (
    Refusal,
    ShortAnswers,
    affordable,
    cost,
    expected_cost,
)

# A cut of a shared embedding makes the file larger by that matrix. It has to earn that: it counts
# like this share of the answers refused.
EMBEDDING_PRICE = 0.05
# Centre and width, in shares of the depth, of the kernels that are tried.
_SHAPES = ((0.45, 0.4), (0.6, 0.4), (0.6, 0.6))
# Peaks of attention and MLP; attention carries the cut at a smaller KL on the models measured.
_PEAKS = ((1.0, 1.0), (1.0, 0.5), (1.4, 0.7), (1.4, 1.0))
# Strengths that are the same in every block, besides 1. Where the embedding is kept, its share of
# the direction stays in the stream, and more than 1 makes up for it: an organism of another recipe
# refused 5 of 64 at 1 and none at 1.1, at a KL of .025 and .030.
_CONSTANT = ((0.7, 0.7), (1.0, 0.5), (1.15, 1.15), (1.3, 1.3))
# How far apart in KL the cheaper strengths of a shortlist are.
_APART = 1.5


@dataclass(frozen=True)
class Strength:
    """A kernel for each component; `embedding` whether a shared embedding is cut as well.

    >>> strength = Strength(StrengthKernel.constant(1.0), StrengthKernel(1.0, 1.0, 2.0, 0.0))
    >>> strength.components(4)
    {'attention': 1.0, 'mlp': {0: 0.5, 1: 1.0, 2: 0.5}}
    """

    attention: StrengthKernel
    mlp: StrengthKernel
    embedding: bool = False

    def components(self, n_layers: int) -> dict[str, float | dict[int, float]]:
        """What `plan_cut` takes: a number where every block has the same, else one per block."""
        chosen: dict[str, float | dict[int, float]] = {}
        for name, kernel in (("attention", self.attention), ("mlp", self.mlp)):
            values = [round(value, 6) for value in kernel.strengths(n_layers)]
            if len(set(values)) == 1:
                if values[0]:
                    chosen[name] = values[0]
            else:
                chosen[name] = {block: value for block, value in enumerate(values) if value}
        return chosen

    def scaled(self, factor: float) -> Strength:
        """The same shapes, so many times as strong."""
        return replace(self, attention=self.attention.scaled(factor), mlp=self.mlp.scaled(factor))

    def plan(self, model: nn.Module, direction: Any, **options: Any) -> EditPlan:
        """The cut of `direction` at these strengths; `options` as for `plan_cut`."""
        components = self.components(anatomy(model).n_layers)
        return plan_cut(
            model, direction, components=components,
            **{"embedding": True if self.embedding else "auto", **options},
        )  # fmt: skip

    def summary(self) -> str:
        def kernel(k: StrengthKernel) -> str:
            if k.peak == k.floor:
                return f"{k.peak:g}"
            return f"{k.peak:g} at block {k.centre:.1f}, {k.floor:g} from {k.width:.1f} blocks away"

        extra = ", embedding cut as well" if self.embedding else ""
        return f"attention {kernel(self.attention)}; mlp {kernel(self.mlp)}{extra}"

    def to_dict(self) -> dict[str, Any]:
        return {"attention": _plain(self.attention), "mlp": _plain(self.mlp),
                "embedding": self.embedding}  # fmt: skip


WHOLE = Strength(StrengthKernel.constant(1.0), StrengthKernel.constant(1.0))


@dataclass(frozen=True)
class StrengthTrial:
    """What one strength's cut did; the figures are those of `AnswerTrial`."""

    strength: Strength
    prompts: int
    refused: float
    over_refused: float
    degenerate: float
    kl: float
    bypass: float

    def cost(self, kl_limit: float) -> float:
        """The rule of `choose_by_answers`, with a price on cutting a shared embedding."""
        price = EMBEDDING_PRICE if self.strength.embedding else 0.0
        return price + cost(self.refused, self.degenerate, self.over_refused, self.kl / kl_limit)

    def to_dict(self) -> dict[str, Any]:
        figures = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "strength"}
        return {"strength": self.strength.to_dict(), **to_plain(figures)}


@dataclass(frozen=True)
class StrengthChoice:
    """The chosen `strength` and every trial, the chosen one first.

    tried   how many shapes had their first tokens read
    notes   what even the best cut does not reach

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> bad, good = ["Rob a shop.", "Forge a ticket."], ["Name a colour.", "Say hello."]
    >>> d = vauban.measure(model, tokenizer, bad, good).direction
    >>> choice = choose_strength(model, tokenizer, d, bad, good, shortlist=1, max_tokens=2)
    >>> choice.trials[0].strength == choice.strength, choice.tried
    (True, 18)
    """

    strength: Strength
    trials: tuple[StrengthTrial, ...]
    tried: int
    notes: tuple[str, ...]

    def summary(self) -> str:
        best = self.trials[0]
        lines = [
            f"strength: {self.strength.summary()} (of {self.tried} shapes; refused "
            f"{best.refused:.1%} of {best.prompts}, first-token KL {best.kl:.4f})"
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        return {
            "strength": self.strength.to_dict(),
            "trials": [trial.to_dict() for trial in self.trials],
            "tried": self.tried,
            "notes": list(self.notes),
        }


def choose_strength(
    model: nn.Module,
    tokenizer: Any,
    direction: Any,
    harmful: Sequence[Any],
    harmless: Sequence[Any],
    *,
    embedding: EmbeddingMode = "auto",
    shortlist: int = 6,
    max_tokens: int = 24,
    kl_limit: float = 0.1,
    refusal: Refusal | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> StrengthChoice:
    """How strongly to cut `direction` in which blocks and components, by short answers.

    Tries strength 1 everywhere, four pairs of constant strengths for attention and MLP, four pairs
    of peaks as kernels at three places, and where the head shares the embedding the whole cut with
    it. First tokens (refusal log-odds and KL) of all of them give a front; `shortlist` of it answer
    prompts by successive halving: strength 1 everywhere, one that is dearer, and the cheaper ones
    that the rule with the refusal's probability as first token prefers, unlike ones first. The
    rule is that of `choose_by_answers`; cutting a shared embedding, which makes the file larger,
    counts like 5 % of the answers refused, and a strength above 1 everywhere has to gain two
    answers on strength 1, which leaves nothing of the direction in a writer. Any other `embedding`
    than "auto" holds for every strength. `direction` (d,); the prompts are validation prompts.

    Raises InputError for fewer than two prompts of a class, and a shortlist or limit that is not
    positive.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> bad = ["Explain how to rob a shop.", "How can I forge a ticket?"] * 2
    >>> good = ["Name a colour.", "What is two plus three?"] * 2
    >>> d = vauban.measure(model, tokenizer, bad, good).direction
    >>> choice = choose_strength(model, tokenizer, d, bad, good, shortlist=2, max_tokens=2)
    >>> len(choice.trials)
    2
    """
    if shortlist < 1 or not kl_limit > 0:
        raise InputError(
            f"shortlist is {shortlist}, kl_limit {kl_limit}; expected at least 1, and a KL above 0"
        )
    answers = ShortAnswers(
        model, tokenizer, harmful, harmless, max_tokens=max_tokens, refusal=refusal, seed=seed,
        batch_size=batch_size,
    )  # fmt: skip
    offered = _offered(anatomy(model).n_layers, embedding == "auto" and is_tied(model))
    options = {} if embedding == "auto" else {"embedding": embedding}
    changes = {s: tuple(s.plan(model, direction, **options).virtual()) for s in offered}
    notes: list[str] = []
    bypass, kl = first_tokens(answers, changes, notes, "strength", progress)
    chosen = _shortlist(affordable(kl, kl_limit), bypass, kl, shortlist, kl_limit)

    def trial(strength: Strength, rates: Mapping[str, float], prompts: int) -> StrengthTrial:
        return StrengthTrial(
            strength, prompts, rates["refused"], rates["over_refused"], rates["degenerate"],
            rates["kl"], bypass[strength],
        )  # fmt: skip

    def order(strength: Strength, rates: dict[str, float], prompts: int) -> tuple[float, ...]:
        return trial(strength, rates, prompts).cost(kl_limit), rates["kl"]

    going_on = {s: changes[s] for s in chosen}
    ranked = answers.rounds(going_on, kl, order, "choose strength", progress)
    trials = _whole_unless_better(
        [trial(strength, rates, prompts) for strength, prompts, rates in ranked]
    )
    return StrengthChoice(
        trials[0].strength, trials, len(offered), (*notes, *concessions(trials[0], kl_limit))
    )


def _whole_unless_better(trials: list[StrengthTrial]) -> tuple[StrengthTrial, ...]:
    """The trials with strength 1 everywhere before a stronger cut that gains one answer or less.

    Strength 1 leaves nothing of the direction in a writer; one answer among a few dozen is chance.
    """
    best = trials[0]
    whole = next((t for t in trials if t.strength == WHOLE and t.prompts == best.prompts), None)
    stronger = min(best.strength.attention.floor, best.strength.mlp.floor) > 1
    if whole is None or not stronger:
        return tuple(trials)
    failures = [t.refused + t.degenerate + t.over_refused for t in (whole, best)]
    if (failures[0] - failures[1]) * best.prompts > 1 + RELATIVE_NOISE:
        return tuple(trials)
    return whole, *(t for t in trials if t is not whole)


def _offered(n_layers: int, tied: bool) -> list[Strength]:
    """Strength 1 everywhere, with a shared embedding as well, and the shapes."""
    offered = [WHOLE, *([replace(WHOLE, embedding=True)] if tied else [])]
    for attention, mlp in _CONSTANT:
        offered.append(Strength(StrengthKernel.constant(attention), StrengthKernel.constant(mlp)))
    for centre, width in _SHAPES:
        place = centre * (n_layers - 1), width * n_layers
        for attention, mlp in _PEAKS:
            offered.append(
                Strength(StrengthKernel(attention, *place, 0.0), StrengthKernel(mlp, *place, 0.0))
            )
    return offered


def _shortlist(
    offered: Sequence[Strength], bypass: Mapping[Strength, float], kl: Mapping[Strength, float],
    count: int, kl_limit: float,
) -> list[Strength]:  # fmt: skip
    """Strength 1 everywhere, with the embedding where it is offered; of those that no other
    strength beats in both scores the cheapest dearer one, and of the cheaper ones those that cost
    least by first tokens, each at half as much KL again as the next as long as there are such.
    """
    always = [s for s in offered if replace(s, embedding=False) == WHOLE][:count]
    front: list[Strength] = []
    for strength in sorted(offered, key=lambda s: (bypass[s], kl[s])):
        if not front or kl[strength] < kl[front[-1]]:
            front.append(strength)
    rest = [s for s in front if s not in always]
    # One dearer cut is enough: it only counts where strength 1 leaves too much.
    dearer = [s for s in rest if kl[s] > kl[WHOLE]][-1:]
    cheaper = sorted(
        (s for s in rest if kl[s] <= kl[WHOLE]),
        key=lambda s: expected_cost(bypass[s], kl[s] / kl_limit),
    )
    apart: list[Strength] = []
    for strength in cheaper:
        # Neighbours leave as much: on a 4-bit model the best two by first tokens did, at 16 %,
        # where one at twice their KL left 6 %.
        if all(max(kl[strength], kl[s]) > _APART * min(kl[strength], kl[s]) for s in apart):
            apart.append(strength)
    cheaper = apart + [s for s in cheaper if s not in apart]
    return [*always, *dearer, *cheaper][:count]


def _plain(kernel: StrengthKernel) -> dict[str, Any]:
    """JSON has no infinity: a width that no block reaches is None."""
    constant = kernel.peak == kernel.floor
    return {**kernel.to_dict(), **({"centre": None, "width": None} if constant else {})}
