"""Measure a concept direction: class means at every layer and position, held-out layer choice.

Collects through `vauban.activations`, estimates with arrays; cuts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban._arrays import floats
from vauban._common import RELATIVE_NOISE, Progress
from vauban.directions.candidates import Key
from vauban.directions.causal import choose_causally
from vauban.directions.class_moments import (
    ClassMoments,
    Split,
    reduce_classes,
    score_layers,
    split_prompts,
    stored,
    streamed,
    unit_rows,
)
from vauban.directions.loud_coordinates import (
    LOUD_MULTIPLE,
    MASKED,
    clip_for,
    loud_coordinates,
    ruling_note,
    standing_out,
)
from vauban.directions.mean_estimators import Estimator, check_mask, estimator, pooled_variance
from vauban.directions.result import DirectionResult, model_name
from vauban.errors import InputError
from vauban.models import fingerprint
from vauban.prompts import post_instruction_positions

# Layers past this share of the depth are left out: their norms are large, their effect small.
DEEPEST = 0.8
# Held-out prompts of each class that a chooser asks (Arditi et al. 2024 take 32).
VALIDATION = 32

Chooser = Callable[
    [dict[Key, mx.array], Mapping[str, list[Any]]], tuple[Key, dict[str, Any], list[str]]
]
"""({(position, residual): raw vector}, held-out prompts by class) -> the chosen (position,
residual), facts for the provenance, notes."""


def residual_limit(n_layers: int) -> int:
    """The last residual that automatic choice may take: int(0.8 · L), at least 1."""
    return max(1, int(DEEPEST * n_layers))


def measure(
    model: nn.Module,
    tokenizer: Any,
    harmful: Sequence[Any],
    harmless: Sequence[Any],
    clip_quantile: float | Literal["auto"] = 0.0,
    *,
    method: str = "mean_difference",
    loud_multiple: float | None = None,
    layer: int | Literal["auto", "causal"] | Chooser = "auto",
    positions: tuple[int, ...] | Literal["post_instruction"] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    selection: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> DirectionResult:
    """`vauban.measure` (see there), which adds choice by answers: a `Chooser` as `layer`.

    A chooser is offered the directions of the fitting two thirds at residuals 1 to L-1 and all
    positions, and at most 32 held-out prompts of each class.
    """
    estimate = estimator(method, loud_multiple)
    sets = {"harmless": list(harmless), "harmful": list(harmful)}
    check_sets(sets)
    wanted = _positions(tokenizer, positions)
    splits = {name: split_prompts(prompts, seed) for name, prompts in sets.items()}
    classes, clipped = _read_classes(
        model, tokenizer, sets, splits, wanted, clip_quantile, estimate, batch_size, progress
    )
    low, high = classes["harmless"], classes["harmful"]
    whole = low.whole, high.whole
    means = mx.stack([moments.mean for moments in whole])
    full = estimate(*whole)
    table = score_layers(low, high)
    n_layers = int(full.shape[0]) - 1
    chosen_later = layer == "causal" or callable(layer)
    residual, column = _choose(table["cohens_d"], "auto" if chosen_later else layer, n_layers)
    if selection and layer != "causal":
        raise InputError(
            "selection holds options of layer='causal' and 'answers'; leave it out or ask for those"
        )
    notes: list[str] = []
    facts: dict[str, Any] = {"layer": layer, **clipped}
    if chosen_later:
        raw = estimate(low.fit, high.fit)
        deepest = n_layers - 1 if callable(layer) else min(residual_limit(n_layers), n_layers - 1)
        offered = {
            (position, r): raw[r, i]
            for i, position in enumerate(wanted)
            for r in range(1, deepest + 1)
        }
        tested = {n: [sets[n][i] for i in splits[n][1][:VALIDATION]] for n in sets}
        if callable(layer) and offered:
            (position, residual), chosen, notes = layer(offered, tested)
            facts |= chosen
        else:
            (position, residual), found, notes = choose_causally(
                model, tokenizer, offered, tested["harmful"], tested["harmless"],
                (wanted[column], residual),
                # The layers are those of "auto": int(0.8 · L) itself is still offered.
                **{"prune_layers": 0.0, "batch_size": batch_size, "progress": progress,
                   **(selection or {})},
            )  # fmt: skip
            facts |= {"layer": "causal", "selection": found.to_dict() if found else None}
        column = wanted.index(position)
    if any(fitting is held_out for fitting, held_out in splits.values()):
        notes.append("fewer than 6 distinct prompts in a class: its layer scores are not held out")
    at = tuple(one[:, column] for one in (np.array(whole[0].mean), np.array(whole[0].variance)))
    if method == MASKED:
        facts["loud_multiple"] = LOUD_MULTIPLE if loud_multiple is None else float(loud_multiple)
        facts["masked"] = _masked(at[0], facts["loud_multiple"])
        check_mask(
            full[residual, column], means[0, residual, column], means[1, residual, column],
            facts["masked"].get(str(residual), []), f" at residual {residual}",
        )  # fmt: skip
    elif method == "mean_difference":
        marked = [one for one in loud_coordinates(*at) if one.residual == residual]
        spread = pooled_variance(*whole)[residual, column]
        ruled = ruling_note(np.array(full[residual, column]), spread, marked)
        notes += [ruled] if ruled else []
    result = _result(
        model, tokenizer, full[1:, column], means[:, 1:, column],
        {name: values[1:, column] for name, values in table.items()},
        residual - 1, wanted[column], facts.pop("clip_quantile"), seed, sets, notes, facts, method,
    )  # fmt: skip
    return replace(result, fingerprint=fingerprint(model, tokenizer))


def _read_classes(
    model: nn.Module, tokenizer: Any, sets: dict[str, list[Any]], splits: dict[str, Split],
    positions: tuple[int, ...], clip_quantile: Any, estimate: Estimator,
    batch_size: int | None, progress: Progress | None,
) -> tuple[dict[str, ClassMoments], dict[str, Any]]:  # fmt: skip
    """The two classes, and what was clipped: the quantile and, for "auto", the residuals."""
    residuals: list[int] | None = None
    chosen: dict[str, Any] = {}
    if isinstance(clip_quantile, str) and clip_quantile != "auto":
        raise InputError(
            f"clip_quantile is {clip_quantile!r}; expected 'auto' or a number, 0 <= q < 0.5"
        )
    if not clip_quantile or clip_quantile == "auto":
        read = streamed(model, tokenizer, sets, splits, positions, batch_size, progress)
        classes = reduce_classes(read, splits, estimate)
        if not clip_quantile:
            return classes, {"clip_quantile": clip_quantile}
        harmless = classes["harmless"].whole
        clip_quantile, residuals = clip_for(np.array(harmless.mean), np.array(harmless.variance))
        chosen = {"clip_chosen": "auto", "clip_residuals": residuals}
        if not residuals:
            return classes, {"clip_quantile": clip_quantile, **chosen}
    read = stored(model, tokenizer, sets, positions, clip_quantile, batch_size, progress, residuals)
    return reduce_classes(read, splits, estimate), {"clip_quantile": clip_quantile, **chosen}


def _masked(harmless_mean: np.ndarray, multiple: float) -> dict[str, list[int]]:
    """The masked coordinates of residuals (R, d), by residual; those without any left out."""
    marks = standing_out(harmless_mean, multiple)
    return {str(r): np.flatnonzero(row).tolist() for r, row in enumerate(marks) if row.any()}


def check_sets(sets: dict[str, list[Any]]) -> None:
    """InputError for two sets of prompts, "harmless" and "harmful", that give no direction."""
    for name, prompts in sets.items():
        if not prompts:
            raise InputError(f"the {name} prompt set is empty; expected at least 2 prompts")
        if len(prompts) < 2:
            raise InputError(f"the {name} set holds one prompt; expected at least 2")
    keys = {name: {str(p) for p in prompts} for name, prompts in sets.items()}
    if keys["harmless"] == keys["harmful"]:
        raise InputError("the harmful and the harmless set are the same: there is no direction")
    shared = keys["harmless"] & keys["harmful"]
    if shared:
        raise InputError(
            f"{len(shared)} prompts are in both sets, for example {sorted(shared)[0]!r}; "
            "a prompt belongs to one class"
        )


def _positions(tokenizer: Any, positions: Any) -> tuple[int, ...]:
    if positions is None:
        return (-1,)
    if isinstance(positions, str):
        if positions != "post_instruction":
            raise InputError(
                f"positions is {positions!r}; expected 'post_instruction', a tuple of negative "
                "ints or None"
            )
        return tuple(post_instruction_positions(tokenizer))
    wanted = tuple(int(p) for p in positions)
    if not wanted or max(wanted) >= 0:
        raise InputError(f"positions {wanted}; expected negative ints counted from the last token")
    return wanted


def _choose(table: np.ndarray, layer: Any, n_layers: int) -> tuple[int, int]:
    """(residual, position column) by held-out Cohen's d; table is (L+1, P)."""
    if isinstance(layer, str):
        if layer != "auto":
            raise InputError(
                f"layer is {layer!r}; expected 'auto', 'causal', 'answers' or a block index"
            )
        candidates = table[1 : residual_limit(n_layers) + 1]
        # argmax takes the first of equals: the earlier layer, then the earlier position.
        row, column = np.unravel_index(int(np.argmax(candidates)), candidates.shape)
        return int(row) + 1, int(column)
    if not 0 <= int(layer) < n_layers:
        raise InputError(f"layer {layer} does not exist; the model has blocks 0 to {n_layers - 1}")
    return int(layer) + 1, int(np.argmax(table[int(layer) + 1]))


def _result(
    model: nn.Module, tokenizer: Any, raw: mx.array, means: mx.array,
    table: dict[str, np.ndarray], layer: int, position: int, clip_quantile: float, seed: int,
    sets: dict[str, list[Any]], notes: list[str], facts: dict[str, Any] | None = None,
    method: str = "mean_difference",
) -> DirectionResult:  # fmt: skip
    norms = mx.linalg.norm(raw, axis=-1)
    # A masked coordinate may be far larger than the rest; it does not decide what noise is.
    counted = mx.where(raw[layer] == 0, mx.zeros_like(means[:, layer]), means[:, layer])
    size = float(mx.linalg.norm(counted, axis=-1).max())
    if float(norms[layer]) <= RELATIVE_NOISE * size:
        raise InputError(
            f"the class means at the output of block {layer}, position {position}, are equal: "
            "there is no direction there"
        )
    units = unit_rows(raw)
    direction = units[layer]
    along = floats((means[:, layer] * direction).sum(axis=-1))
    # The seed's score: the gap of mean projections on each layer's own direction.
    cosine_scores = floats(((means[1] - means[0]) * units).sum(axis=-1))
    projections = {"harmless": along[0], "harmful": along[1]}
    middle = (projections["harmless"] + projections["harmful"]) / 2
    if middle <= 0:
        notes.append(
            f"zero is not on the harmless side of the direction (harmless {along[0]:+.2f}, "
            f"harmful {along[1]:+.2f}): setting the projection to zero may leave refusal in place "
            "or refuse safe requests; mix the harmless set, or choose another layer"
        )
    mx.eval(units, norms, means)
    return DirectionResult(
        direction=direction,
        layer_index=layer,
        cosine_scores=cosine_scores,
        d_model=int(raw.shape[-1]),
        model_path=model_name(tokenizer),
        directions=units,
        norms=norms,
        means=means,
        projections=projections,
        scores={name: [float(v) for v in values] for name, values in table.items()},
        position=position,
        method=method,
        provenance={
            "seed": seed,
            "clip_quantile": clip_quantile,
            "n_harmful": len(sets["harmful"]),
            "n_harmless": len(sets["harmless"]),
            **(facts or {}),
        },
        warnings=tuple(notes),
    )
