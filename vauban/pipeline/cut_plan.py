"""From a configuration and a direction to a plan: the cut itself, and the control beside it.

Knows configurations and plans; runs a model only to calibrate a plan.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import mlx.core as mx

from vauban._common import Progress
from vauban.config import RunConfig
from vauban.directions import DirectionResult, select_target_layers
from vauban.directions.class_moments import split_prompts
from vauban.directions.measure import VALIDATION
from vauban.edits import EditPlan, plan_cut
from vauban.edits.modules import refuse_unknown_packing
from vauban.errors import VaubanWarning
from vauban.export import check_adaptable, check_layout
from vauban.pipeline.prompt_sets import PromptSet
from vauban.pipeline.stages import ADAPTER_HEAD, Opened
from vauban.search import Strength, StrengthChoice, choose_strength


class ChosenStrength(Protocol):
    """Strengths, and how they were chosen as run.json records it: "strength", "trials", "tried"."""

    @property
    def strength(self) -> Strength: ...

    def to_dict(self) -> dict[str, Any]: ...


_BY_SCORE = ("above_median", "top_k")
_SHARED = f"{ADAPTER_HEAD}: the shared one is cut"


def strength_stage(
    opened: Opened,
    config: RunConfig,
    result: DirectionResult,
    harmful: PromptSet,
    harmless: PromptSet,
    *,
    progress: Progress | None = None,
) -> StrengthChoice | None:
    """`choose_strength` on the measuring prompts' held-out third; None where the user says what is
    cut: a number for alpha, or layers, components or norms."""
    cut, default = config.cut, type(config.cut)()
    given = (cut.layers, cut.components, cut.norm_preserve)
    if cut.alpha != "auto" or given != (default.layers, default.components, None):
        return None
    sets = [
        [prompts[i] for i in split_prompts(prompts, config.seed)[1][:VALIDATION]]
        for prompts in (list(harmful.prompts), list(harmless.prompts))
    ]
    # An adapter gives the head no matrix of its own, so a shared embedding is out of reach.
    adapter = config.output.precision == "adapter" and cut.embedding == "auto"
    return choose_strength(
        opened.model, opened.tokenizer, result.direction, *sets,
        embedding=False if adapter else cut.embedding, seed=config.seed,
        batch_size=config.measure.batch_size, progress=progress,
    )  # fmt: skip


def plan_stage(
    opened: Opened,
    config: RunConfig,
    result: DirectionResult,
    strength: ChosenStrength | None = None,
) -> EditPlan:
    """`vauban.plan_cut` with the settings of the configuration, at the chosen strength if any.

    Raises:
        InputError: the precision is "adapter", which cannot hold this cut.
    """
    chosen = strength.strength if strength else None
    return _plan(opened, config, _chosen_layers(config, result), result, strength=chosen)


def check_plan(opened: Opened, config: RunConfig) -> None:
    """Refuse a cut that cannot be made, or that no file can hold, before anything is measured.

    It is planned with a stand-in for the direction. Blocks that are chosen by their scores are not
    known yet; `plan_stage` checks those.
    """
    layers, output = config.cut.layers, config.output
    if layers in _BY_SCORE:
        if output.layout != "hf":
            return
        layers = "all"  # Names and shapes are alike, whichever blocks it will be.
    with warnings.catch_warnings():
        # The true plan says them again.
        warnings.simplefilter("ignore", VaubanWarning)
        plan = _plan(opened, config, layers, mx.ones(opened.info.d_model))
    modules = dict(opened.model.named_modules())
    for update in plan.updates:
        refuse_unknown_packing(modules[update.path])
    if output.layout == "hf":
        check_layout(plan, opened.folder, output.precision, output.layout)


def calibrate_stage(
    opened: Opened,
    config: RunConfig,
    plan: EditPlan,
    harmful: PromptSet,
    harmless: PromptSet,
    *,
    progress: Progress | None = None,
) -> EditPlan:
    """`EditPlan.calibrated` on the first measuring prompts, where packed modules stay packed."""
    count = config.output.calibrate
    if not count or opened.info.quantization is None or config.output.precision != "same":
        return plan
    prompts = [*harmful.prompts[:count], *harmless.prompts[:count]]
    return plan.calibrated(opened.tokenizer, prompts, seed=config.seed, progress=progress)


def control_plan(
    opened: Opened,
    config: RunConfig,
    result: DirectionResult,
    direction: mx.array,
    strength: ChosenStrength | None = None,
) -> EditPlan:
    """The same cut of another direction, without norms restored, so that it has a run-time form."""
    chosen = strength.strength if strength else None
    layers = _chosen_layers(config, result)
    return _plan(opened, config, layers, direction, control=True, strength=chosen)


def _chosen_layers(config: RunConfig, result: DirectionResult) -> str | Sequence[int]:
    """The blocks to cut; those that are chosen by their scores as a list.

    Blocks are ranked by Cohen's d on held-out prompts. The gap of the class means
    (`cosine_scores`) grows with the residual's norm, so it would always choose the last blocks.
    """
    layers = config.cut.layers
    if layers in _BY_SCORE:
        return select_target_layers(result.scores["cohens_d"], str(layers))
    return layers


def _plan(
    opened: Opened,
    config: RunConfig,
    layers: str | Sequence[int],
    direction: Any,
    *,
    control: bool = False,
    strength: Strength | None = None,
) -> EditPlan:
    """The plan of the configuration; a `control` without norm preservation.

    For an adapter, a True that would untie the head cuts the shared matrix instead, as it does
    where the model's class cannot untie either.
    """
    settings = config.cut
    adapter = config.output.precision == "adapter"

    def planned(embedding: Any) -> EditPlan:
        return plan_cut(
            opened.model,
            direction,
            layers=layers,
            alpha=1.0 if settings.alpha == "auto" else settings.alpha,
            components=strength.components(opened.info.n_layers)
            if strength
            else settings.components,
            embedding=embedding,
            norm_preserve=None if control else settings.norm_preserve,
        )

    plan = planned(True if strength and strength.embedding else settings.embedding)
    if not adapter:
        return plan
    if settings.embedding is True and plan.embedding == "untie":
        plan = replace(planned("tied"), notes=(*plan.notes, _SHARED))
    check_adaptable(plan)
    return plan
