"""The refusal surface: where on the axes of its prompts a model refuses, and what its stream says.

Scans rows in one pass each. `surface_rows` reads the rows, `surface_cells` counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vauban._arrays import floats
from vauban._common import Progress
from vauban._results import to_plain
from vauban.activations import collect_activations
from vauban.directions import DirectionResult
from vauban.directions.measure import measure
from vauban.errors import InputError, ModelError, shown
from vauban.evaluation.behaviour import Judge, answer_texts, judge_answers
from vauban.evaluation.surface_cells import (
    MINIMUM,
    Cell,
    Coverage,
    Threshold,
    cell,
    coverage,
    fit_threshold,
    group,
)
from vauban.evaluation.surface_rows import LABELS, SurfacePrompt
from vauban.evaluation.verdicts import Label
from vauban.generation import PromptReading, can_read_prompts, eos_ids, generate_tokens
from vauban.interventions import Intervention
from vauban.linalg import as_direction
from vauban.models import anatomy
from vauban.prompts import encode_chat, instruction_end

MAPS = (("harm", "language"), ("style", "language"), ("category", "harm"), ("framing", "turns"))
"""The pairs of axes that a report draws."""

NUMBERS = ("refusal", "harmfulness", "harm")
"""What a threshold can be fitted along: the two projections, or the rows' own grade."""


@dataclass(frozen=True)
class SurfacePoint:
    """One row after the scan.

    Attributes:
        row: the prompt and its axes.
        harmfulness: projection at the instruction's last token.
        refusal: projection behind it, at the template's end.
        verdict: what `classify_answer` says of the answer.
        refused: whether it refuses; None without a verdict.
        answer: the greedy answer.
    """

    row: SurfacePrompt
    harmfulness: float
    refusal: float
    verdict: Label
    refused: bool | None
    answer: str

    def to_dict(self) -> dict[str, Any]:
        """The row with its figures, without the answer."""
        return {
            **self.row.to_dict(),
            "harmfulness": self.harmfulness,
            "refusal": self.refusal,
            "verdict": self.verdict,
            "refused": self.refused,
        }


@dataclass(frozen=True)
class SurfaceScan:
    """The points of a scan; every figure is counted from them.

    Attributes:
        points: in the order of the rows.
        residuals, positions: where "harmfulness" and "refusal" were read.
        cosine: of the two directions at the refusal's residual; None where one stands for both.
        max_tokens: longest answer.
        one_pass: whether residuals and answers came from one prefill.

    >>> row = SurfacePrompt("Rob a shop.", "harmful", "money", "direct", "en", 1, "none", 1.0)
    >>> point = SurfacePoint(row, 3.0, 60.0, "refused", True, "I'm sorry, I cannot help.")
    >>> SurfaceScan((point,) * 4, {}, {}, None, 12, True).cells("language")[0].rate
    1.0
    """

    points: tuple[SurfacePoint, ...] = field(repr=False)
    residuals: Mapping[str, int]
    positions: Mapping[str, int]
    cosine: float | None
    max_tokens: int
    one_pass: bool

    def cells(self, *axes: str, minimum: int = MINIMUM) -> list[Cell]:
        """The cells over some axes with counts, rates and 95 % intervals; over none: all rows.

        A rate is None where fewer than `minimum` answers have a verdict; `harmful` and `harmless`
        are None where the cell has too few of that class.
        """
        rows = self._axes(axes)
        return [
            cell(
                dict(zip(axes, values, strict=True)),
                [self.points[i].row.label for i in places],
                [self.points[i].refused for i in places],
                {name: [getattr(self.points[i], name) for i in places] for name in NUMBERS[:2]},
                minimum,
            )
            for values, places in group(rows, axes).items()
        ]

    def threshold(
        self, axis: str | None = None, *, along: str = "refusal"
    ) -> Threshold | dict[Any, Threshold | None] | None:
        """Where refusal starts along a projection or the graded harm: a logistic fit, with AUC.

        Args:
            axis: one fit for every value of this axis, as a dictionary; None: one over all rows.
            along: "refusal", "harmfulness" (projections) or "harm".

        None stands for a class (refused or not) that is missing.
        """
        if along not in NUMBERS:
            raise InputError(f"along is {shown(along)}; expected one of {', '.join(NUMBERS)}")
        names = () if axis is None else (axis,)
        fits = {}
        for values, places in group(self._axes(names), names).items():
            judged = [p for p in (self.points[i] for i in places) if p.refused is not None]
            numbers = [p.row.harm if along == "harm" else getattr(p, along) for p in judged]
            fits[values] = fit_threshold(numbers, [bool(p.refused) for p in judged])
        return fits[()] if axis is None else {values[0]: fit for values, fit in fits.items()}

    def coverage(self, *axes: str, minimum: int = MINIMUM) -> Coverage:
        """How many of the cells that can exist hold rows."""
        return coverage(self._axes(axes), axes, minimum)

    def counts(self) -> list[str]:
        """How many rows of each label are refused, in words."""
        (whole,) = self.cells(minimum=1)
        return [
            f"{label} {rate.refused} of {rate.judged} refused"
            for label in LABELS
            if (rate := getattr(whole, label)) is not None
        ]

    def summary(self) -> str:
        parts = self.counts()
        fit = self.threshold()
        if isinstance(fit, Threshold):
            parts.append(f"the projection at the template's end tells them with AUC {fit.auc:.3f}")
        if self.cosine is not None:
            parts.append(f"cosine of harmfulness and refusal {self.cosine:+.2f}")
        return f"{len(self.points)} rows: " + "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Points, the maps of `MAPS`, thresholds and coverage; JSON-safe, without the answers."""
        (whole,) = self.cells()
        return {
            "rows": len(self.points),
            "residuals": dict(self.residuals),
            "positions": dict(self.positions),
            "cosine": self.cosine,
            "max_tokens": self.max_tokens,
            "one_pass": self.one_pass,
            "all": whole.to_dict(),
            "maps": [
                {
                    "axes": list(axes),
                    "cells": [c.to_dict() for c in self.cells(*axes)],
                    "coverage": self.coverage(*axes).to_dict(),
                }
                for axes in MAPS
            ],
            "thresholds": {
                along: {
                    "all": to_plain(self.threshold(along=along)),
                    "language": _plain_keys(self.threshold("language", along=along)),
                }
                for along in NUMBERS
            },
            "points": [point.to_dict() for point in self.points],
        }

    def _axes(self, axes: Sequence[str]) -> list[dict[str, Any]]:
        return [{axis: point.row.axis(axis) for axis in axes} for point in self.points]


def _plain_keys(fits: Any) -> dict[str, Any]:
    return {str(value): to_plain(fit) for value, fit in fits.items()}


def measure_harmfulness(
    model: nn.Module,
    tokenizer: Any,
    harmful: Sequence[Any],
    harmless: Sequence[Any],
    result: DirectionResult,
    **options: Any,
) -> DirectionResult:
    """The direction between harmful and harmless prompts at the instruction's last token.

    Harmfulness is told there, before the template's tokens at whose end refusal is decided, and the
    two directions differ (Zhao et al. 2025, arXiv 2507.11878). It is measured at the block of
    `result`, a refusal direction, so that the two can be compared. `options` as for
    `vauban.measure`.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> sets = ["Rob a shop.", "Forge a ticket."], ["Name a colour.", "Say hello."]
    >>> refusal = vauban.measure(model, tokenizer, *sets)
    >>> measure_harmfulness(model, tokenizer, *sets, refusal).position < refusal.position
    True
    """
    end = instruction_end(tokenizer)
    return measure(
        model, tokenizer, harmful, harmless, layer=result.layer_index, positions=(end,), **options
    )


def scan_surface(
    model: nn.Module,
    tokenizer: Any,
    result: DirectionResult | mx.array,
    rows: Sequence[SurfacePrompt],
    *,
    layer: int | None = None,
    harmfulness: DirectionResult | None = None,
    interventions: Iterable[Intervention] = (),
    max_tokens: int = 40,
    phrases: Sequence[str] | None = None,
    judge: Judge | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> SurfaceScan:
    """Answer every row and project its residuals, both from one pass over the prompt.

    Args:
        result: the refusal direction, read at its own residual and position (the template's end).
        rows: as `load_surface_prompts` gives them.
        layer: for a raw array (d,) as `result`: the block whose output it is read at, at the last
            token.
        harmfulness: the direction at the instruction's last token (`measure_harmfulness`); None
            reads `result` there too.
        interventions: in force while prompts are read and answered.
        max_tokens: longest answer; refusals show early.
        phrases, judge: as for `judge_answers`.

    Raises InputError for no rows, a raw array without `layer`, or a direction of another width;
    ModelError for activations that are NaN or inf.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> sets = ["Rob a shop.", "Forge a ticket."], ["Name a colour.", "Say hello."]
    >>> result = vauban.measure(model, tokenizer, *sets)
    >>> rows = vauban.load_surface_prompts()[:16]
    >>> scan = vauban.scan_surface(model, tokenizer, result, rows, max_tokens=4)
    >>> [cell.values for cell in scan.cells("label")]
    [{'label': 'harmful'}, {'label': 'harmless'}]
    """
    if not rows:
        raise InputError("no rows to scan; expected at least one")
    parts = anatomy(model)
    residual, position = _place(result, layer, parts.n_layers)
    residuals = {"refusal": residual, "harmfulness": residual}
    places = {"refusal": position, "harmfulness": instruction_end(tokenizer)}
    if harmfulness is not None:
        residuals["harmfulness"] = harmfulness.residual_index
        places["harmfulness"] = harmfulness.position
    directions = {
        name: as_direction(given, "scan_surface", parts.d_model)
        for name, given in (("refusal", result), ("harmfulness", harmfulness or result))
    }
    positions = tuple(sorted(set(places.values())))
    prompts = [row.prompt for row in rows]
    ids = [encode_chat(tokenizer, prompt) for prompt in prompts]
    changes = tuple(interventions)
    one_pass = can_read_prompts(model)
    reading = PromptReading(positions) if one_pass else None
    answers = generate_tokens(
        model, ids, eos=eos_ids(tokenizer), max_tokens=max_tokens, interventions=changes,
        batch_size=batch_size, reading=reading, progress=progress,
    )  # fmt: skip
    if reading is not None:
        values = mx.stack([reading.values[i] for i in range(len(rows))])
    else:
        values = collect_activations(
            model, tokenizer, ids, positions=positions, interventions=changes,
            batch_size=batch_size,
        ).values  # fmt: skip
    along = {
        name: _along(values[:, residuals[name], positions.index(places[name])], d)
        for name, d in directions.items()
    }
    behaviour = judge_answers(
        prompts, answer_texts(tokenizer, prompts, answers), phrases=phrases, judge=judge,
        finished=[len(answer) < max_tokens for answer in answers],
    )  # fmt: skip
    points = [
        SurfacePoint(row, h, r, label, refused, answer)
        for row, h, r, label, refused, answer in zip(
            rows, along["harmfulness"], along["refusal"], behaviour.labels, behaviour.verdicts,
            behaviour.answers, strict=True,
        )
    ]  # fmt: skip
    return SurfaceScan(
        tuple(points),
        residuals,
        places,
        _cosine(harmfulness, directions["refusal"], residual),
        max_tokens,
        one_pass,
    )


def _along(residuals: mx.array, d: mx.array) -> list[float]:
    """Projections of (n, d) on a unit direction."""
    values = floats(residuals @ d)
    wrong = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
    if wrong is not None:
        raise ModelError(f"row {wrong}: its activations hold NaN or inf; load it in float32")
    return values


def _place(result: Any, layer: int | None, n_layers: int) -> tuple[int, int]:
    """(residual, position) at which a direction is read."""
    if isinstance(result, DirectionResult):
        return result.residual_index, result.position
    if layer is None:
        raise InputError("a raw direction does not say its layer; pass layer=<block>")
    if not 0 <= layer < n_layers:
        raise InputError(f"layer {layer}: the model has blocks 0 to {n_layers - 1}")
    return layer + 1, -1


def _cosine(harmfulness: DirectionResult | None, d: mx.array, residual: int) -> float | None:
    """Of the two directions at the refusal's residual; block i's output is residual i + 1."""
    if harmfulness is None:
        return None
    other = harmfulness.directions[residual - 1].astype(mx.float32)
    return float((other * d).sum() / mx.linalg.norm(other))
