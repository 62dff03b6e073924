"""What a search has found: its trials, the front, the best of it; saved as search.json.

Knows trials and directions; a result that has just been made also knows its model.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban._common import Progress
from vauban._results import to_plain
from vauban.edits import EditPlan
from vauban.errors import InputError
from vauban.search.front import Trial, best_of, describe_front, front_of
from vauban.search.rescore import Rescored, score_fresh
from vauban.search.short_answers import Refusal, ShortAnswers
from vauban.search.space import SearchSpace, strength_of

FORMAT = 1
"""The version of search.json's layout."""


@dataclass(frozen=True, eq=False)
class Bound:
    """The model that a search ran on, and what its trials need again."""

    model: nn.Module
    tokenizer: Any
    direction: Callable[[Trial], mx.array]
    seen: frozenset[str]
    refusal: Refusal | None
    batch_size: int | None


@dataclass(frozen=True, eq=False)
class SearchResult:
    """All trials in their order, and what follows from them.

    baseline    the unchanged model on the validation prompts: refused, over_refused, degenerate,
                perplexity (None where it is no objective)
    kl_limit    the limit of `best`, None for the rule of the choices alone
    stopped     "trials", "timeout", "interrupted", or "no refusal": the model does not refuse, so
                that nothing was tried
    identity    what the search depends on: model, prompts, space, seed, ...
    seconds     where this process's time went, by stage
    directions  {trial number: unit direction (d,)} of the front and of the default cut
    rescored    the front on fresh prompts, where it was scored again

    >>> mild = Trial(0, {}, 0.1, 0.0, 0.01, 0.0, "complete", 0.1, None, 16)
    >>> whole = Trial(1, {}, 0.0, 0.0, 0.03, 0.0, "complete", 0.0, None, 16)
    >>> dear = Trial(2, {}, 0.0, 0.0, 0.30, 0.0, "complete", 0.0, None, 16)
    >>> baseline = {"refused": 1.0, "over_refused": 0.0, "degenerate": 0.0, "perplexity": None}
    >>> result = SearchResult(
    ...     (mild, whole, dear), ("refused", "kl"), baseline, None, "trials", SearchSpace(), {}
    ... )
    >>> [trial.number for trial in result.front], result.best().number
    ([1, 0], 1)
    """

    trials: tuple[Trial, ...]
    objectives: tuple[str, ...]
    baseline: Mapping[str, Any]
    kl_limit: float | None
    stopped: str
    space: SearchSpace
    identity: Mapping[str, Any] = field(repr=False)
    seconds: Mapping[str, float] = field(default_factory=dict, repr=False)
    directions: Mapping[int, mx.array] = field(default_factory=dict, repr=False)
    rescored: Rescored | None = None
    bound: Bound | None = field(default=None, repr=False)

    @property
    def front(self) -> tuple[Trial, ...]:
        """The complete trials that no other one beats in all objectives, least refused first."""
        return front_of(self.trials, self.objectives)

    def best(self, kl_limit: float | None = None) -> Trial:
        """The trial to take: with a limit, the least refused one that keeps it.

        Without one (here and in the search) the rule of `choose_by_answers` decides: refusals,
        degenerate answers, over-refusals, and a tenth of the first-token KL in units of 0.1.
        Raises CheckError, which names the nearest trial, where none keeps the limit.
        """
        return best_of(self.front, self.kl_limit if kl_limit is None else kl_limit)

    def direction(self, trial: Trial | int) -> mx.array:
        """A trial's unit direction (d,); InputError where a loaded result does not have it."""
        trial = self._trial(trial)
        if trial.number in self.directions:
            return self.directions[trial.number]
        if self.bound is None:
            raise InputError(
                f"trial {trial.number} is not on the front; a loaded result has the directions of "
                f"trials {', '.join(map(str, sorted(self.directions)))}"
            )
        return self.bound.direction(trial)

    def plan(self, trial: Trial | int | None = None, *, model: nn.Module | None = None) -> EditPlan:
        """The trial's cut as a plan (None: the best one's); a loaded result needs the model."""
        chosen = self.best() if trial is None else self._trial(trial)
        if model is None and self.bound is None:
            raise InputError("a loaded result knows no model; pass plan(trial, model=...)")
        planned = model or self.bound.model  # type: ignore[union-attr]
        return plan_of(planned, self.direction(chosen), chosen.parameters)

    def rescore(
        self,
        harmful: Sequence[Any],
        harmless: Sequence[Any],
        *,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        trials: Sequence[Trial] | None = None,
        progress: Progress | None = None,
    ) -> Rescored:
        """Score the front (or `trials` of it) and the default cut on prompts that no trial saw.

        Answers are as long as the search's, so that figures compare. Wilson intervals, exact
        McNemar tests against the default cut, and the loss of the best trial between the two
        scores; `notes` say which prompts were in the search after all. A loaded result needs model
        and tokenizer.
        """
        if (model is None or tokenizer is None) and self.bound is None:
            raise InputError("a loaded result knows no model; pass model=... and tokenizer=...")
        winner = self.best()
        front = self.front if trials is None else tuple(trials)
        if winner not in front:
            front = (winner, *front)
        bound = self.bound
        answers = ShortAnswers(
            model or bound.model,  # type: ignore[union-attr]
            tokenizer or bound.tokenizer,  # type: ignore[union-attr]
            harmful,
            harmless,
            max_tokens=int(self.identity["max_tokens"]),
            refusal=bound.refusal if bound else None,
            seed=int(self.identity["seed"]),
            batch_size=bound.batch_size if bound else None,
        )
        seen = bound.seen if bound else frozenset()
        again = [prompt for prompt in (*harmful, *harmless) if str(prompt) in seen]
        notes = []
        if again:
            notes.append(
                f"{len(again)} of the prompts were in the search already, so they are not fresh "
                f"(first: {str(again[0])!r:.60})"
            )
        changes = {
            trial.number: self.plan(trial, model=answers.model).virtual()
            for trial in (self._trial(0), *front)
        }
        return score_fresh(
            answers, changes, front, self._trial(0), winner, notes=notes, progress=progress
        )

    def summary(self) -> str:
        if self.stopped == "no refusal":
            return (
                f"the model refuses {self.baseline['refused']:.1%} of the harmful validation "
                "prompts; there is nothing to search"
            )
        pruned = sum(trial.state == "pruned" for trial in self.trials)
        lines = [
            f"{len(self.trials)} trials, {pruned} stopped early; {len(self.front)} on the front of "
            f"{describe_front(self.objectives)}",
            *(trial.summary() for trial in self.front),
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            **to_plain(self.identity),
            "objectives": list(self.objectives),
            "baseline": dict(self.baseline),
            "kl_limit": self.kl_limit,
            "stopped": self.stopped,
            "space": self.space.to_dict(),
            "front": [trial.number for trial in self.front],
            # inf, the KL of a cut that overflows, is no JSON.
            "trials": [
                {**t.to_dict(), "kl": t.kl if np.isfinite(t.kl) else None} for t in self.trials
            ],
            "rescored": self.rescored and self.rescored.to_dict(),
        }

    def save(self, path: str | Path) -> Path:
        """Write search.json, complete or not at all."""
        target = Path(path)
        known = {**self.directions}
        if self.bound:
            known |= {t.number: self.direction(t) for t in (*self.trials[:1], *self.front)}
        document = {
            **self.to_dict(),
            "identity": dict(self.identity),
            "directions": {str(n): _packed(d) for n, d in sorted(known.items())},
        }
        partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
        try:
            text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        return target

    @classmethod
    def load(cls, path: str | Path) -> SearchResult:
        """Read what `save` wrote; InputError for another file."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"{path}: not a search.json: {error}") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT or "trials" not in values:
            raise InputError(f"{path}: not a search.json of format {FORMAT}")
        trials = tuple(
            Trial(**{**trial, "kl": float("inf") if trial["kl"] is None else trial["kl"]})
            for trial in values["trials"]
        )
        return cls(
            trials, tuple(values["objectives"]), values["baseline"], values["kl_limit"],
            values["stopped"], SearchSpace.from_dict(values["space"]), values["identity"],
            directions={int(n): _unpacked(text) for n, text in values["directions"].items()},
            rescored=Rescored.from_dict(values["rescored"]) if values["rescored"] else None,
        )  # fmt: skip

    def _trial(self, trial: Trial | int) -> Trial:
        number = trial if isinstance(trial, int) else trial.number
        if not 0 <= number < len(self.trials):
            raise InputError(f"trial {number} does not exist; there are {len(self.trials)} trials")
        return self.trials[number]


def plan_of(model: nn.Module, direction: mx.array, parameters: Mapping[str, Any]) -> EditPlan:
    """A trial's cut: its direction, its strengths, its norm mode."""
    return strength_of(parameters).plan(model, direction, norm_preserve=parameters["norm_mode"])


def _packed(direction: mx.array) -> str:
    return base64.b64encode(np.array(direction, dtype=np.float32).tobytes()).decode("ascii")


def _unpacked(text: str) -> mx.array:
    return mx.array(np.frombuffer(base64.b64decode(text), dtype=np.float32))
