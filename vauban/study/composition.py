"""What earlier cuts do to later directions: measured again block by block, and in a second pass.

An intervention at one block changes what the blocks after it read, so a direction that was
measured on the unchanged model may no longer be the one that matters. Knows fits and prompts;
gives facts, and conditions that the instruments measure like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban._common import RELATIVE_NOISE
from vauban.activations import collect_activations
from vauban.directions.separation import auc
from vauban.interventions import Ablate, Intervention
from vauban.study.conditions import Condition
from vauban.study.fits import Fits
from vauban.study.matched_choice import Choice


def compose(
    model: nn.Module,
    tokenizer: Any,
    fits: Fits,
    choice: Choice,
    harmful: Sequence[Any],
    harmless: Sequence[Any],
    held_out: tuple[Sequence[Any], Sequence[Any]],
) -> tuple[dict[str, Any], list[Condition]]:
    """(facts, conditions) of composition at the position of `choice`.

    "layers": for every block the norm of the difference measured again under the cuts of all
    blocks before it, relative to the first measurement, and the cosine of the two. "second": after
    `choice` is ablated everywhere, the difference at its residual relative to what it was, its
    cosine with the first, and the AUC of both passes on `held_out` (harmful, harmless).
    """
    position, chosen_residual = choice.key

    def residuals(prompts: Sequence[Any], changes: Sequence[Intervention], at: int) -> mx.array:
        return collect_activations(
            model, tokenizer, prompts, positions=(position,), interventions=changes
        ).at(at, position)

    def difference(changes: Sequence[Intervention], at: int) -> mx.array:
        rows = residuals([*harmless, *harmful], changes, at)
        return rows[len(harmless) :].mean(axis=0) - rows[: len(harmless)].mean(axis=0)

    def held_out_auc(direction: mx.array, changes: Sequence[Intervention]) -> float:
        positive, negative = (
            np.array(residuals(prompts, changes, chosen_residual) @ direction, dtype=np.float64)
            for prompts in held_out
        )
        return float(auc(negative, positive))

    once: list[Intervention] = []
    again: list[Intervention] = []
    layers: list[dict[str, Any]] = []
    for block in range(fits.n_layers):
        first = fits.difference((position, block))
        low, _ = fits.means((position, block))
        if not float(mx.linalg.norm(first)) > RELATIVE_NOISE * float(mx.linalg.norm(low)):
            # A template's token before any attention: there is no direction to cut.
            layers.append({"block": block, "norm_ratio": None, "cosine": None})
            continue
        second = difference(again, block) if again else first
        layers.append({"block": block, **_relation(first, second)})
        once.append(Ablate(first, [block]))
        again.append(Ablate(second, [block]))
    cut = Ablate(choice.vector)
    remaining = difference([cut], chosen_residual)
    facts: dict[str, Any] = {
        "position": position,
        "residual": chosen_residual,
        "layers": layers,
        "second": {
            **_relation(choice.vector, remaining),
            "auc_first": held_out_auc(choice.vector, []),
            "auc_second": held_out_auc(remaining, [cut]),
        },
    }
    conditions: dict[str, Sequence[Intervention]] = {
        "per-layer directions, measured once": once,
        "per-layer directions, remeasured": again,
        "second pass after the cut": [Ablate(mx.stack([choice.vector, remaining]))],
    }
    return facts, [
        Condition(name, "composition", "other", "all", tuple(changes))
        for name, changes in conditions.items()
    ]


def _relation(first: mx.array, second: mx.array) -> dict[str, float]:
    """The norm of `second` relative to that of `first`, and their cosine."""
    a, b = (float(mx.linalg.norm(v)) for v in (first, second))
    return {"norm_ratio": b / a, "cosine": float((first * second).sum()) / max(a * b, 1e-30)}
