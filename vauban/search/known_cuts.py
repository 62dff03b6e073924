"""The cuts that a search begins with: the default of quick mode, and what came next to it.

The choices by answers have tried dozens of cuts already; their best ones are the first trials.
Knows the choices; scores nothing itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn

from vauban._common import Progress
from vauban.edits.embedding import is_tied
from vauban.models import anatomy
from vauban.search.answers import AnswerTrial, choose_by_answers
from vauban.search.direction_table import DirectionTable
from vauban.search.short_answers import Refusal
from vauban.search.space import SearchSpace
from vauban.search.strength import WHOLE, Strength, choose_strength

# The chosen cut fainter, so many times as strong: KL falls with the square, refusals come back
# later. On Qwen2.5-Coder-0.5B-Instruct no proposal came near these (docs/real-model.md).
FAINTER = (0.8, 0.6, 0.5, 0.4)
# Runners-up among the strengths of the chosen direction, and among the directions.
STRENGTHS = 2
DIRECTIONS = 2


def known_cuts(
    model: nn.Module,
    tokenizer: Any,
    table: DirectionTable,
    space: SearchSpace,
    harmful: Sequence[Any],
    harmless: Sequence[Any],
    *,
    max_tokens: int,
    refusal: Refusal | None,
    seed: int,
    batch_size: int | None,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """Parameters of the cuts to begin with, the default cut first.

    The direction that `choose_by_answers` takes at the strength that `choose_strength` takes; the
    same cut fainter, and whole; the next strengths; then the runners-up among the directions, and
    the one that the first tokens alone would choose (as a causal choice does), at the chosen
    strength. All moved into the space, each once; a space without the chosen position or estimator
    gets what it holds. An embedding that the head shares is left alone.
    """
    options: dict[str, Any] = {
        "max_tokens": max_tokens, "refusal": refusal, "seed": seed, "batch_size": batch_size,
        "progress": progress,
    }  # fmt: skip
    n_layers, method = anatomy(model).n_layers, space.estimators[0]
    assert space.residuals is not None
    candidates = table.candidates(method, space.residuals)
    if not candidates:
        return []
    choice = choose_by_answers(model, tokenizer, candidates, harmful, harmless, **options)
    strength = choose_strength(
        model, tokenizer, choice.direction, harmful, harmless,
        embedding=False if is_tied(model) else "auto", **options,
    )  # fmt: skip
    best = choice.shortlist[0]
    chosen = strength.strength
    offers: list[tuple[AnswerTrial, Strength]] = [(best, chosen)]
    offers += [(best, chosen.scaled(factor)) for factor in FAINTER]
    offers += [(best, WHOLE)]
    offers += [(best, trial.strength) for trial in strength.trials[1:]][:STRENGTHS]
    causal = min(choice.shortlist, key=lambda trial: trial.bypass)
    runners_up = [*choice.shortlist[1 : 1 + DIRECTIONS], causal]
    offers += [(trial, chosen) for trial in runners_up]
    known: list[dict[str, Any]] = []
    for trial, kernels in offers:
        point = space.parameters(n_layers, trial.layer, trial.position, kernels, method)
        if point is not None and point not in known:
            known.append(point)
    return known
