"""Choose a direction by what the model says under its cut: cheap scores shortlist, answers decide.

First-token log-odds are fooled: after some cuts a model begins with another word and refuses all
the same. So they rank, with the separation of the classes, and short greedy answers under the
run-time cut choose. Knows candidates and models; cuts no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban._common import RELATIVE_NOISE, Progress
from vauban._results import to_plain
from vauban.activations import collect_activations
from vauban.directions.candidates import Key, candidate_table
from vauban.directions.refusal_odds import last_token_kl, refusal_log_odds, refusal_token_ids
from vauban.directions.separation import cohens_d
from vauban.errors import InputError
from vauban.evaluation import answer_texts, answer_tokens, is_degenerate, is_refusal
from vauban.interventions import Ablate
from vauban.linalg import as_direction
from vauban.models import PromptReader, SharedPrefix, anatomy
from vauban.prompts import encode_chat

# Two candidates whose directions have a larger cosine than this are one for the shortlist.
ALIKE = 0.9
# Prompts of each class in the cheap pass over all candidates, and in the first round of answers.
FIRST_PROMPTS = 8
# What a KL at its limit weighs against answers: a quarter of them refused.
KL_WEIGHT = 0.25


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
        excess = self.kl / kl_limit
        price = KL_WEIGHT * min(excess, 1.0) + max(0.0, excess - 1.0)
        return self.refused + self.degenerate + self.over_refused + price

    def to_dict(self) -> dict[str, Any]:
        return to_plain(self)


@dataclass(frozen=True, eq=False)
class AnswerChoice:
    """The chosen `direction` (d,), raw, of (position, residual `layer`), and what its cut did.

    shortlist  every candidate that was asked, the chosen one first, the others by their last round
    notes      what had to be given up
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
    shortlist: int = 8,
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
       the better half by it a bypass score (refusal log-odds of the first token under its ablation
       of all blocks, on 8 harmful prompts).
    2. The shortlist takes turns between the two rankings and skips what is nearly parallel
       (cosine above 0.9) to what it has, as long as there is something else.
    3. Each of the shortlist answers 8 prompts of each class greedily with `max_tokens`; the better
       half goes on with twice the prompts, and so on until one is left or all prompts are used.

    The rule: a candidate costs the share of harmful prompts refused, plus the share of degenerate
    answers, plus the share of harmless prompts refused, plus its first-token KL on harmless prompts
    in units of `kl_limit`: a quarter of it up to the limit, in full beyond. So a KL at the limit
    weighs as much as a quarter of the answers refused, and what exceeds it is dear but not
    forbidden. Ties go to the smaller KL, then the earlier position, then the earlier residual. The
    best candidate is always returned; `notes` say where it refuses, degenerates or exceeds the
    limit.

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
    for name, prompts in (("harmful", harmful), ("harmless", harmless)):
        if len(prompts) < 2:
            raise InputError(
                f"{len(prompts)} {name} validation prompts; answers are compared on at least 2"
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
    sets = _shuffled(harmful, harmless, seed)
    notes: list[str] = []
    asked = _Cuts(model, tokenizer, *sets, max_tokens, refusal or is_refusal, batch_size)
    separations = _separations(model, tokenizer, table, *sets, batch_size)
    names = sorted(table, key=lambda key: -separations[key])
    scored = names[: max(shortlist, (len(names) + 1) // 2)]
    bypass = asked.bypass_scores({key: table[key] for key in scored}, notes, progress)
    trials = {
        key: AnswerTrial(*key, 0, 1.0, 0.0, 0.0, 0.0, bypass[key], separations[key])
        for key in _diverse(table, separations, bypass, shortlist)
    }
    finished: list[AnswerTrial] = []
    going_on = list(trials)
    rounds = _rounds(len(going_on), min(FIRST_PROMPTS, asked.most), asked.most)
    total, done = sum(candidates for candidates, _ in rounds), 0
    for candidates_left, count in rounds:
        finished += [trials[key] for key in going_on[candidates_left:]]
        going_on = going_on[:candidates_left]
        for key in going_on:
            trials[key] = asked.trial(trials[key], table[key], count)
            done += 1
            if progress:
                progress("choose by answers", done, total)
        going_on.sort(key=lambda key: (trials[key].cost(kl_limit), trials[key].kl, key[0], key[1]))
    best = trials[going_on[0]]
    order = [trials[key] for key in going_on] + sorted(
        finished, key=lambda t: (-t.prompts, t.cost(kl_limit))
    )
    return AnswerChoice(
        best.position, best.layer, table[best.position, best.layer], best.refused,
        best.over_refused, best.degenerate, best.kl, kl_limit, best.prompts, tuple(order),
        (*notes, *_concessions(best, kl_limit)),
    )  # fmt: skip


def _raw_vector(vector: Any, size: int) -> mx.array:
    """A candidate's raw vector (d,); of a basis its first row."""
    raw = mx.array(vector)
    raw = raw if raw.ndim == 1 else raw[0]
    as_direction(raw, "candidate", size)
    return raw


def _concessions(best: AnswerTrial, kl_limit: float) -> Iterable[str]:
    """What even the best candidate does not reach, in words."""
    if best.refused > 0:
        yield f"{best.refused:.1%} of {best.prompts} harmful prompts are still refused"
    if best.degenerate > 0:
        yield f"{best.degenerate:.1%} of the answers to harmful prompts are degenerate"
    if best.over_refused > 0:
        yield f"{best.over_refused:.1%} of {best.prompts} harmless prompts are refused"
    if best.kl > kl_limit:
        yield f"the first-token KL of {best.kl:.3f} exceeds its limit of {kl_limit:g}"


def _shuffled(
    harmful: Sequence[Any], harmless: Sequence[Any], seed: int
) -> tuple[list[Any], list[Any]]:
    random = np.random.default_rng(seed)
    first, second = ([p[i] for i in random.permutation(len(p))] for p in (harmful, harmless))
    return first, second


def _rounds(candidates: int, prompts: int, most: int) -> list[tuple[int, int]]:
    """(candidates, prompts of each class) of every round of successive halving.

    The last round asks all prompts, so that what is reported of the winner rests on all of them.
    """
    rounds = []
    while candidates > 1 and prompts < most:
        rounds.append((candidates, prompts))
        candidates, prompts = max(1, candidates // 2), min(most, 2 * prompts)
    return [*rounds, (candidates, most)]


def _separations(
    model: nn.Module, tokenizer: Any, table: dict[Key, mx.array], harmful: list[Any],
    harmless: list[Any], batch_size: int | None,
) -> dict[Key, float]:  # fmt: skip
    """Cohen's d of the prompts' projections on each candidate, at its own place."""
    positions = tuple(sorted({position for position, _ in table}))
    classes = [
        collect_activations(model, tokenizer, prompts, positions=positions, batch_size=batch_size)
        for prompts in (harmless, harmful)
    ]
    separations = {}
    for (position, residual), vector in table.items():
        low, high = (
            np.array(c.at(residual, position) @ vector, dtype=np.float64)[:, None] for c in classes
        )
        separations[position, residual] = float(cohens_d(low, high)[0])
    return separations


def _diverse(
    table: dict[Key, mx.array], separations: dict[Key, float], bypass: dict[Key, float], count: int
) -> list[Key]:
    """The best of both rankings in turn, none nearly parallel to another while others are left."""
    rankings = [
        sorted(bypass, key=lambda key: (bypass[key], key)),
        sorted(bypass, key=lambda key: (-separations[key], key)),
    ]
    units = {key: table[key] / mx.linalg.norm(table[key]) for key in bypass}
    chosen: list[Key] = []
    for limit in (ALIKE, 1.0 - RELATIVE_NOISE):
        for pair in zip(*rankings, strict=True):
            for key in pair:
                cosines = [abs(float((units[key] * units[other]).sum())) for other in chosen]
                if len(chosen) < count and max(cosines, default=0.0) < limit:
                    chosen.append(key)
    return chosen or rankings[0][:1]


@dataclass(eq=False)
class _Cuts:
    """The model under one candidate's cut after another: first tokens and answers."""

    model: nn.Module
    tokenizer: Any
    harmful: list[Any]
    harmless: list[Any]
    max_tokens: int
    refusal: Callable[[str], bool]
    batch_size: int | None

    def __post_init__(self) -> None:
        encoded = [[encode_chat(self.tokenizer, p) for p in prompts] for prompts in self._sets]
        prefix = SharedPrefix(self.model, [*encoded[0], *encoded[1]], record=False)
        self._bypass_reader = PromptReader(
            self.model, encoded[0][:FIRST_PROMPTS], record=False, batch_size=self.batch_size,
            prefix=prefix,
        )  # fmt: skip
        self._kl_reader = PromptReader(
            self.model, encoded[1], record=False, batch_size=self.batch_size, prefix=prefix
        )

    @property
    def _sets(self) -> tuple[list[Any], list[Any]]:
        return self.harmful, self.harmless

    @property
    def most(self) -> int:
        """How many prompts of each class the last round asks."""
        return min(len(self.harmful), len(self.harmless))

    def bypass_scores(
        self, table: dict[Key, mx.array], notes: list[str], progress: Progress | None
    ) -> dict[Key, float]:
        """Mean refusal log-odds of the first token under each cut; 0 where no token says it."""
        try:
            ids = refusal_token_ids(self.tokenizer)
        except InputError as error:
            notes.append(f"the shortlist rests on separation alone, because {error}")
            return dict.fromkeys(table, 0.0)
        scores = {}
        for number, (key, vector) in enumerate(table.items(), 1):
            odds = refusal_log_odds(self._bypass_reader.logits([Ablate(vector)]), ids)
            scores[key] = float(odds.mean())
            if progress:
                progress("first tokens", number, len(table))
        return scores

    def trial(self, trial: AnswerTrial, vector: mx.array, prompts: int) -> AnswerTrial:
        """The trial with answers to the first `prompts` of each class under its cut."""
        change = [Ablate(vector)]
        texts = []
        for group in self._sets:
            ids = answer_tokens(
                self.model, self.tokenizer, group[:prompts], max_tokens=self.max_tokens,
                interventions=change, batch_size=self.batch_size,
            )  # fmt: skip
            texts.append(answer_texts(self.tokenizer, group[:prompts], ids))
        kl = last_token_kl(self._kl_reader.baseline, self._kl_reader.logits(change))
        return replace(
            trial,
            prompts=prompts,
            refused=sum(map(self.refusal, texts[0])) / prompts,
            over_refused=sum(map(self.refusal, texts[1])) / prompts,
            degenerate=sum(map(is_degenerate, texts[0])) / prompts,
            kl=float(kl.mean()),
        )
