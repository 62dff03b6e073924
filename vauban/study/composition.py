"""What earlier cuts do to later directions: measured again layer by layer, and in a second pass.

An intervention at one block changes what the blocks after it read, so a direction that was
measured on the unchanged model may no longer be the one that matters. Knows fits and prompts;
gives facts and conditions that the instruments measure like any other.
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
from vauban.study.choose import Choice
from vauban.study.conditions import Condition
from vauban.study.fits import Fits


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
    cosine with the first, and the held-out AUC (`held_out` harmful, harmless) of both passes.
    """
    position, residual = choice.key
    n_layers = fits.n_layers

    def difference(changes: Sequence[Intervention], at: int) -> mx.array:
        prompts = [*harmless, *harmful]
        values = collect_activations(
            model, tokenizer, prompts, positions=(position,), interventions=changes
        ).at(at, position)
        return values[len(harmless) :].mean(axis=0) - values[: len(harmless)].mean(axis=0)

    once: list[Intervention] = []
    again: list[Intervention] = []
    layers: list[dict[str, Any]] = []
    for block in range(n_layers):
        first = fits.difference((position, block))
        low, _ = fits.means((position, block))
        if float(mx.linalg.norm(first)) <= RELATIVE_NOISE * float(mx.linalg.norm(low)):
            # A template's token before any attention: there is no direction to cut.
            layers.append({"block": block, "norm_left": None, "cosine": None})
            continue
        second = difference(again, block) if again else first
        layers.append({"block": block, **_relation(first, second)})
        once.append(Ablate(first, [block]))
        again.append(Ablate(second, [block]))
    cut = Ablate(choice.vector)
    left = difference([cut], residual)
    facts: dict[str, Any] = {
        "position": position,
        "residual": residual,
        "layers": layers,
        "second": {
            **_relation(choice.vector, left),
            "auc_first": _held_out_auc(
                model, tokenizer, held_out, choice.vector, [], residual, position
            ),
            "auc_second": _held_out_auc(
                model, tokenizer, held_out, left, [cut], residual, position
            ),
        },
    }

    def condition(name: str, changes: Sequence[Intervention]) -> Condition:
        return Condition(name, "composition", "other", "all", tuple(changes))

    return facts, [
        condition("per-layer directions, measured once", once),
        condition("per-layer directions, remeasured", again),
        condition("second pass after the cut", [
            Ablate(mx.stack([choice.vector, left]))
        ]),
    ]  # fmt: skip


def _relation(first: mx.array, second: mx.array) -> dict[str, float]:
    a, b = (float(mx.linalg.norm(v)) for v in (first, second))
    return {
        "norm_left": b / a,
        "cosine": float((first * second).sum()) / max(a * b, 1e-30),
    }


def _held_out_auc(
    model: nn.Module,
    tokenizer: Any,
    held_out: tuple[Sequence[Any], Sequence[Any]],
    direction: mx.array,
    changes: Sequence[Intervention],
    residual: int,
    position: int,
) -> float:
    """How well held-out projections on a direction tell the classes apart under `changes`."""
    found = []
    for prompts in held_out:
        values = collect_activations(
            model, tokenizer, prompts, positions=(position,), interventions=changes
        ).at(residual, position)
        found.append(np.array(values @ direction, dtype=np.float64))
    harmful, harmless = found
    return float(auc(harmless, harmful))
