"""Choose a direction by what the model says under its cut: cheap scores shortlist, answers decide.

First-token log-odds are fooled: after some cuts a model begins with another word and refuses all
the same. So they rank, with the separation of the classes, and short greedy answers under the
run-time cut choose. Knows candidates and models; cuts no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban._common import RELATIVE_NOISE, Progress
from vauban._results import to_plain
from vauban.activations import collect_activations
from vauban.directions.candidates import Key, candidate_table
from vauban.directions.separation import cohens_d
from vauban.edits import plan_cut
from vauban.errors import InputError
from vauban.interventions import Intervention
from vauban.linalg import as_direction
from vauban.models import anatomy
from vauban.search.short_answers import ShortAnswers, affordable, cost, expected_cost

# Two candidates whose directions have a larger cosine than this are one for the shortlist.
ALIKE = 0.9
# First tokens are read of this many candidates per place on the shortlist.
SCORED = 3


@dataclass(frozen=True)
class AnswerTrial:
    """What answers under one candidate's cut were like; rates over `prompts` of each class.

    `layer` is a residual index. `refused` and `degenerate` are over harmful prompts, `over_refused`
    and `kl` (first token, nats) over harmless ones. `bypass` and `separation` are the cheap scores.
    """

    position: int
    layer: int
    prompts: int
    refused: float
    over_refused: float
    degenerate: float
    kl: float
    bypass: float
    separation: float

    def cost(self, kl_limit: float) -> float:
        """The rule of `choose_by_answers`: smaller is better."""
        return cost(self.refused, self.degenerate, self.over_refused, self.kl / kl_limit)

    def to_dict(self) -> dict[str, Any]:
        return to_plain(self)


@dataclass(frozen=True, eq=False)
class AnswerChoice:
    """The chosen `direction` (d,), raw, of (position, residual `layer`), and what its cut did.

    shortlist  every candidate that was asked, the chosen one first, the others by their last round
    notes      what had to be given up

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> bad, good = ["Rob a shop.", "Forge a ticket."], ["Name a colour.", "Say hello."]
    >>> offered = {(-1, 4): mx.ones(128)}
    >>> choice = choose_by_answers(model, tokenizer, offered, bad, good, max_tokens=4)
    >>> choice.layer, choice.prompts, choice.to_dict()["refused"] == choice.refused
    (4, 2, True)
    """

    position: int
    layer: int
    direction: mx.array = field(repr=False)
    refused: float
    over_refused: float
    degenerate: float
    kl: float
    kl_limit: float
    prompts: int
    shortlist: tuple[AnswerTrial, ...]
    notes: tuple[str, ...]

    def summary(self) -> str:
        lines = [
            f"residual {self.layer}, position {self.position}, of {len(self.shortlist)} that were "
            f"asked: under its cut {self.refused:.1%} of {self.prompts} harmful prompts refused, "
            f"{self.over_refused:.1%} of the harmless ones, {self.degenerate:.1%} degenerate, "
            f"first-token KL {self.kl:.4f}"
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in to_plain(self).items() if name != "direction"}


def choose_by_answers(
    model: nn.Module,
    tokenizer: Any,
    candidates: Any,
    harmful: Sequence[Any],
    harmless: Sequence[Any],
    *,
    shortlist: int = 6,
    max_tokens: int = 24,
    kl_limit: float = 0.1,
    refusal: Callable[[str], bool] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> AnswerChoice:
    """The candidate under whose cut the model refuses least, at the least cost elsewhere.

    `candidates` as for `select_direction`: `collect_candidates`' result, a `DirectionResult` or
    {(position, residual): raw vector (d,)}. All residuals from 1 to L-1 and all positions take
    part; no share of the layers is left out. `harmful` and `harmless` are validation prompts that
    the candidates were not measured on; they are shuffled with `seed`.

    1. Every candidate gets a separation (Cohen's d of the prompts' projections at its place), and
       the better half by it, at most 3 times the shortlist, two scores of the first token under
       its cut: refusal log-odds on 8 harmful prompts, and KL on 8 harmless ones. The cut is
       `plan_cut`'s default, at run time.
    2. The shortlist takes turns between three rankings: the rule below with the refusal's
       probability as first token for the share refused, separation, and log-odds. It leaves out
       what by its KL alone costs more than no cut at all, and skips what is nearly parallel (cosine
       above 0.9) to what it has, as long as there is something else.
    3. Each of the shortlist answers 8 harmful prompts greedily with `max_tokens`; the better half,
       at least 3, goes on with twice the prompts, until 3 answer all of them. The last round asks
       the harmless prompts as well, and takes the KL over all of them.

    The rule: a candidate costs the share of harmful prompts refused, plus the share of degenerate
    answers, plus the share of harmless prompts refused, plus a tenth of its first-token KL on
    harmless prompts in units of `kl_limit`. So a KL at the limit weighs as much as a tenth of
    the answers refused, and nothing is forbidden. Ties go to the smaller KL, then the earlier
    position, then the earlier residual. The best candidate is always returned; `notes` say where it
    refuses, degenerates or exceeds the limit.

    `refusal(text) -> bool` replaces `is_refusal`. Raises InputError for fewer than two prompts of a
    class, a shortlist or limit that is not positive, and candidates of the wrong size.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> bad = ["Explain how to rob a shop.", "How can I forge a ticket?"]
    >>> good = ["Name a colour.", "What is two plus three?"]
    >>> offered = vauban.collect_candidates(model, tokenizer, bad, good)
    >>> found = choose_by_answers(model, tokenizer, offered, bad, good, shortlist=2, max_tokens=4)
    >>> 1 <= found.layer < len(model.layers)
    True
    """
    if shortlist < 1 or not kl_limit > 0:
        raise InputError(
            f"shortlist is {shortlist}, kl_limit {kl_limit}; expected at least 1, and a KL above 0"
        )
    parts = anatomy(model)
    table = {
        key: _raw_vector(vector, parts.d_model)
        for key, vector in candidate_table(candidates).items()
        if 1 <= key[1] < parts.n_layers
    }
    if not table:
        raise InputError(
            f"no candidate lies at a residual from 1 to {parts.n_layers - 1}; there is nothing to "
            "choose from"
        )
    answers = ShortAnswers(
        model, tokenizer, harmful, harmless, max_tokens=max_tokens, refusal=refusal, seed=seed,
        batch_size=batch_size,
    )  # fmt: skip
    notes: list[str] = []
    separations = _separations(answers, table)
    names = sorted(table, key=lambda key: -separations[key])
    scored = names[: max(shortlist, min(SCORED * shortlist, (len(names) + 1) // 2))]
    changes = {key: _cut(model, table[key]) for key in scored}
    bypass, kl = first_tokens(answers, changes, notes, "first tokens", progress)
    open_to = affordable(kl, kl_limit)
    orders = [
        [key for key in order if key in open_to]
        for order in rankings(separations, bypass, kl, kl_limit)
    ]
    going_on = {key: changes[key] for key in _diverse(table, orders, shortlist)}

    def trial(key: Key, rates: Mapping[str, float], prompts: int) -> AnswerTrial:
        return AnswerTrial(
            *key, prompts, rates["refused"], rates["over_refused"], rates["degenerate"],
            rates["kl"], bypass[key], separations[key],
        )  # fmt: skip

    def order(key: Key, rates: Mapping[str, float], prompts: int) -> tuple[float, ...]:
        return trial(key, rates, prompts).cost(kl_limit), rates["kl"], *key

    ranked = answers.rounds(going_on, kl, order, "choose by answers", progress)
    trials = [trial(key, rates, prompts) for key, prompts, rates in ranked]
    best = trials[0]
    return AnswerChoice(
        best.position, best.layer, table[best.position, best.layer], best.refused,
        best.over_refused, best.degenerate, best.kl, kl_limit, best.prompts, tuple(trials),
        (*notes, *concessions(best, kl_limit)),
    )  # fmt: skip


def _cut(model: nn.Module, vector: mx.array) -> tuple[Intervention, ...]:
    """The run-time form of the default cut, which keeps an embedding that the head shares."""
    return tuple(plan_cut(model, vector).virtual())


def _raw_vector(vector: Any, size: int) -> mx.array:
    """A candidate's raw vector (d,); of a basis its first row."""
    raw = mx.array(vector)
    raw = raw if raw.ndim == 1 else raw[0]
    as_direction(raw, "candidate", size)
    return raw


def concessions(best: Any, kl_limit: float) -> Iterable[str]:
    """What even the best candidate does not reach, in words."""
    if best.refused > 0:
        yield f"{best.refused:.1%} of {best.prompts} harmful prompts are still refused"
    if best.degenerate > 0:
        yield f"{best.degenerate:.1%} of the answers to harmful prompts are degenerate"
    if best.over_refused > 0:
        yield f"{best.over_refused:.1%} of {best.prompts} harmless prompts are refused"
    if best.kl > kl_limit:
        yield f"the first-token KL of {best.kl:.3f} exceeds its limit of {kl_limit:g}"


def _separations(answers: ShortAnswers, table: dict[Key, mx.array]) -> dict[Key, float]:
    """Cohen's d of the prompts' projections on each candidate, at its own place."""
    positions = tuple(sorted({position for position, _ in table}))
    classes = [
        collect_activations(
            answers.model, answers.tokenizer, answers.prompts[name], positions=positions,
            batch_size=answers.batch_size,
        )
        for name in ("harmless", "harmful")
    ]  # fmt: skip
    separations = {}
    for (position, residual), vector in table.items():
        low, high = (
            np.array(c.at(residual, position) @ vector, dtype=np.float64)[:, None] for c in classes
        )
        separations[position, residual] = float(cohens_d(low, high)[0])
    return separations


def first_tokens(
    answers: ShortAnswers, changes: Mapping[Any, Sequence[Intervention]], notes: list[str],
    stage: str, progress: Progress | None,
) -> tuple[dict[Any, float], dict[Any, float]]:  # fmt: skip
    """Refusal log-odds on harmful and KL on harmless prompts, a few of each, under each change.

    Odds are 0 where no token says a refusal, and `notes` get that.
    """
    ids: tuple[int, ...] = ()
    try:
        ids = answers.refusal_ids()
    except InputError as error:
        notes.append(f"the log-odds of a refusal rank nothing, because {error}")
    odds, kl = {}, {}
    for number, (key, change) in enumerate(changes.items(), 1):
        odds[key], kl[key] = answers.first_tokens(change, ids)
        if progress:
            progress(stage, number, len(changes))
    return odds, kl


def rankings(
    separations: Mapping[Key, float], bypass: Mapping[Key, float], kl: Mapping[Key, float],
    kl_limit: float,
) -> list[list[Key]]:  # fmt: skip
    """Three orders of the candidates, the best first: by the rule on first tokens, by separation,
    and by log-odds."""
    return [
        sorted(bypass, key=lambda key: (expected_cost(bypass[key], kl[key] / kl_limit), key)),
        sorted(bypass, key=lambda key: (-separations[key], key)),
        sorted(bypass, key=lambda key: (bypass[key], key)),
    ]


def _diverse(
    table: Mapping[Key, mx.array], orders: Sequence[Sequence[Key]], count: int
) -> list[Key]:
    """The best of each order in turn, none nearly parallel to another while others are left."""
    units = {key: table[key] / mx.linalg.norm(table[key]) for key in orders[0]}
    chosen: list[Key] = []
    for limit in (ALIKE, 1.0 - RELATIVE_NOISE):
        for keys in zip(*orders, strict=True):
            for key in keys:
                cosines = [abs(float((units[key] * units[other]).sum())) for other in chosen]
                if len(chosen) < count and max(cosines, default=0.0) < limit:
                    chosen.append(key)
    return chosen or list(orders[0][:1])
