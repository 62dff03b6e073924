"""Where each method takes its direction from: one rule, one set of prompts and scores for all.

The rule of Arditi et al. 2024 on each method's candidates (bypass, induce, KL), with what the study
of INLP adds: local scores, three multipliers, an accurate first classifier. `select_direction`
scores; nothing is fitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from vauban._common import Progress
from vauban.config import StudyConfig
from vauban.directions import NoCandidate, select_direction, select_from_scores
from vauban.study.fits import Fits, Key

Selected = Literal["ablation", "addition", "nullspace", "classifier"]
# Which form of the candidates each method is scored by.
_KINDS: Mapping[Selected, Literal["ablate", "project", "add"]] = {
    "ablation": "ablate",
    "addition": "add",
    "nullspace": "project",
    "classifier": "add",
}


@dataclass(frozen=True, eq=False)
class Choice:
    """Where a method takes its direction from, and how its layers rank.

    `ranked` holds the residuals of all `offered` candidates, best bypass score first, each once.
    `passed` counts the candidates that passed the filters; 0 means that the best of the others
    was taken, and `note` says so.
    """

    key: Key
    vector: mx.array
    ranked: tuple[int, ...]
    passed: int
    offered: int
    scores: Mapping[str, float]
    note: str

    def blocks(self, scope: str, n_layers: int) -> Any:
        """The blocks of a scope: the chosen one, the better half of the ranked, or "all"."""
        if scope == "local":
            return [self.key[1]]
        if scope == "half":
            return sorted(self.ranked[: math.ceil(n_layers / 2)])
        return "all"

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], method: Selected, fits: Fits) -> Choice:
        """A recorded choice; its vector comes from the same fits."""
        key = (int(record["position"]), int(record["residual"]))
        return cls(
            key, candidate(method, fits, key), tuple(record["ranked"]), record["passed"],
            record["offered"], record["scores"], record["note"],
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return {
            "position": self.key[0],
            "residual": self.key[1],
            "ranked": list(self.ranked),
            "passed": self.passed,
            "offered": self.offered,
            "scores": dict(self.scores),
            "note": self.note,
        }


def candidate(method: Selected, fits: Fits, key: Key) -> mx.array:
    """What a method offers at one place: a vector (d,) or a basis (k, d)."""
    if method in ("ablation", "addition"):
        return fits.difference(key)
    return fits.classifier(key) if method == "classifier" else fits.basis(key)


def candidates(method: Selected, fits: Fits, first_accuracy: float) -> dict[Key, mx.array]:
    """What a method offers at all places.

    INLP's are offered only where its first classifier is accurate; at residual 0 of a template's
    token the classes are equal, and `select_direction` drops what is zero up to rounding.
    """
    places = fits.places()
    if method in ("nullspace", "classifier"):
        places = [
            key
            for key in places
            if fits.inlp[key].rank and fits.inlp[key].accuracies[0] >= first_accuracy
        ]
    return {key: candidate(method, fits, key) for key in places}


def choose(
    model: nn.Module,
    tokenizer: Any,
    method: Selected,
    fits: Fits,
    harmful: Sequence[Any],
    harmless: Sequence[Any],
    config: StudyConfig,
    progress: Progress | None = None,
) -> Choice:
    """The place of one method by the common rule; the best unfiltered one where none passes.

    Raises NoCandidate when the method offers no candidate at all.
    """
    settings = config.study
    offered = candidates(method, fits, settings.first_accuracy)
    if not offered:
        closest = max((f.accuracies[0] for f in fits.inlp.values() if f.rank), default=math.nan)
        raise NoCandidate(
            f"{method}: no first classifier reaches an accuracy of {settings.first_accuracy} "
            f"(best {closest:.2f}); lower first_accuracy"
        )

    # All are scored without filters, because the scopes need every layer's rank.
    scored = select_direction(
        model, tokenizer, offered, harmful, harmless,
        kind=_KINDS[method], scope=settings.selection_scope, scores="all",
        kl_threshold=None, induce_threshold=None, prune_layers=settings.prune_layers,
        multipliers=settings.scales, progress=progress,
    )  # fmt: skip
    rule, note = scored, ""
    try:
        rule = select_from_scores(
            scored.records,
            fits.n_layers,
            kl_threshold=settings.kl_threshold,
            induce_threshold=settings.induce_threshold,
            prune_layers=settings.prune_layers,
        )
    except NoCandidate as error:
        note = f"the best candidate of all was taken, because {error}"
    key = (rule.position, rule.layer)
    best = rule.kept[0]
    return Choice(
        key,
        offered[key],
        _ranking(scored.records),
        0 if note else len(rule.kept),
        len(offered),
        {name: float(best[name]) for name in ("bypass", "induce", "kl")},
        note,
    )


def _ranking(records: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """Residuals by their best bypass score, whether a candidate passed the filters or not."""
    scored = [r for r in records if r["bypass"] is not None and not math.isnan(r["bypass"])]
    order = sorted(scored, key=lambda r: (r["bypass"], r["position"], r["layer"]))
    return tuple(dict.fromkeys(int(r["layer"]) for r in order))
