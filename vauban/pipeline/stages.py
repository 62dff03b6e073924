"""The stages that a run and the single verbs share: open, measure, plan, compare.

Each takes what the stage before it made and returns a value. Nothing is written here and nothing
is printed; `progress` is told (stage, done, total).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

import vauban
from vauban.config import RunConfig
from vauban.directions import DirectionResult, measure, select_target_layers
from vauban.edits import EditPlan, plan_cut
from vauban.evaluation import EvalResult, compare_likelihood, evaluate, measure_behaviour
from vauban.evaluation.judge import model_judge
from vauban.export import check_adaptable
from vauban.interventions import Add
from vauban.models import (
    DeviceInfo,
    ForwardCheck,
    ModelInfo,
    describe,
    device_info,
    generate,
    model_folder,
    verify_forward,
)
from vauban.pipeline.sources import EvalSet, PromptSet
from vauban.prompts import encode_chat
from vauban.report import BehaviourRow, Share

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Opened:
    """A loaded model whose forward pass has been checked."""

    model: Any
    tokenizer: Any
    folder: Path
    """Where its files lie; for a Hub id the folder in the Hub's cache."""
    info: ModelInfo
    device: DeviceInfo
    check: ForwardCheck


def open_model(
    path: str, *, adapter: str | None = None, progress: Progress | None = None
) -> Opened:
    """Load a model, with an adapter's folder on it or not, and check the manual forward pass.

    Raises:
        ModelError: the folder cannot be used.
        ArchitectureError: neither way of running the layers gives the model's own logits.
    """
    _tell(progress, "load model", 0, 1)
    model, tokenizer = vauban.load(path, unpack=True, adapter_path=adapter)
    _tell(progress, "load model", 1, 1)
    _tell(progress, "verify forward pass", 0, 1)
    check = verify_forward(model)
    _tell(progress, "verify forward pass", 1, 1)
    return Opened(model, tokenizer, model_folder(path), describe(model), device_info(), check)


def measure_stage(
    opened: Opened,
    config: RunConfig,
    harmful: PromptSet,
    harmless: PromptSet,
    *,
    progress: Progress | None = None,
) -> DirectionResult:
    """`vauban.measure` with the settings of the configuration."""
    settings = config.measure
    _tell(progress, "measure", 0, len(harmful.prompts) + len(harmless.prompts))
    positions = settings.positions
    if positions is None and settings.layer == "causal":
        positions = "post_instruction"
    return measure(
        opened.model,
        opened.tokenizer,
        list(harmful.prompts),
        list(harmless.prompts),
        settings.clip_quantile,
        method=settings.method,
        layer=settings.layer,
        positions=tuple(positions) if isinstance(positions, list) else positions,
        batch_size=settings.batch_size,
        seed=config.seed,
        progress=progress,
    )


def plan_stage(opened: Opened, config: RunConfig, result: DirectionResult) -> EditPlan:
    """`vauban.plan_cut` with the settings of the configuration.

    Raises:
        InputError: the precision is "adapter", which cannot hold this cut.
    """
    return _plan(opened, config, _chosen_layers(config, result), result)


def check_adapter(opened: Opened, config: RunConfig) -> None:
    """Refuse a model that no adapter can hold the cut of before anything is measured on it.

    Blocks that their scores choose are not known yet; `plan_stage` checks those.
    """
    layers = config.cut.layers
    if config.output.precision == "adapter" and layers not in _BY_SCORE:
        _plan(opened, config, layers, mx.ones(opened.info.d_model))


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


LEAK_PROMPTS = 16
"""Held-out prompts of each kind on which the stream is read after the edit."""

EXACT = 1e-3
"""A whole cut that leaves more than this share in the stream is not exact on this architecture."""


def leak_stage(opened: Opened, plan: EditPlan, held_out: EvalSet) -> dict[str, Any]:
    """What is left of the direction in the stream on held-out prompts, under the run-time cut.

    For a head that shares the embedding for good also the KL that the changed head alone costs.
    """
    prompts = [*held_out.harmful[:LEAK_PROMPTS], *held_out.harmless[:LEAK_PROMPTS]]
    tokens = [encode_chat(opened.tokenizer, prompt) for prompt in prompts]
    found: dict[str, Any] = {
        "prompts": len(prompts),
        "stream": plan.stream_leak(opened.model, tokens),
        "whole": plan.is_whole,
    }
    alone = plan.head_alone()
    if alone:
        texts = list(held_out.harmless[:LEAK_PROMPTS])
        answers = generate(opened.model, opened.tokenizer, texts, max_tokens=32)
        found["head_kl"] = compare_likelihood(
            opened.model, opened.tokenizer, texts, answers, interventions=alone
        ).kl
    return found


def leak_warnings(leak: Mapping[str, Any], config: RunConfig) -> list[str]:
    """What a reader has to know of the figures of `leak_stage`."""
    notes = []
    if leak["whole"] and leak["stream"] > EXACT:
        notes.append(
            f"this architecture cannot be cut exactly: up to {leak['stream']:.1%} of the stream "
            "still points along the direction on held-out prompts"
        )
    if "head_kl" in leak:
        adapter = config.output.precision == "adapter"
        why = _ADAPTER_HEAD if adapter else "the head shares the embedding matrix for good"
        notes.append(
            f"{why}, so cutting the embedding changes the head too; "
            f"that alone costs a KL of {leak['head_kl']:.4f} on harmless answers"
        )
    return notes


def changed_model(opened: Opened, plan: EditPlan) -> tuple[Any, Any]:
    """(model, interventions) that stand for the plan before anything is written.

    The model itself under the plan's run-time form.
    """
    return opened.model, plan.virtual()


def evaluate_models(
    opened: Opened,
    changed: tuple[Any, Any],
    config: RunConfig,
    held_out: EvalSet,
    *,
    progress: Progress | None = None,
) -> EvalResult:
    """`vauban.evaluate` with the settings of the configuration.

    Args:
        changed: (model, interventions), as `changed_model` returns them; a model other than the
            original comes without interventions.
    """
    settings = config.eval
    model, interventions = changed
    _tell(progress, "evaluate", 0, 2 * (len(held_out.harmful) + len(held_out.harmless)))
    return evaluate(
        opened.model,
        interventions if model is opened.model else model,
        opened.tokenizer,
        list(held_out.harmful),
        settings.refusal_phrases,
        settings.max_tokens,
        settings.refusal_mode,
        harmless=list(held_out.harmless),
        progress=progress,
    )


def contrast_shares(
    opened: Opened,
    changed: tuple[Any, Any],
    config: RunConfig,
    held_out: EvalSet,
    *,
    progress: Progress | None = None,
) -> tuple[Share | None, Share | None]:
    """Over-refusal of the contrast prompts, before and after; None where the file has none."""
    if not held_out.contrast:
        return None, None
    prompts = list(held_out.contrast)
    shared = _judging(opened, config)
    found: list[Share] = []
    for model, interventions in ((opened.model, ()), changed):
        behaviour = measure_behaviour(
            model,
            opened.tokenizer,
            prompts,
            interventions=interventions,
            progress=_part(progress, "contrast prompts", len(prompts), len(found), 2),
            **shared,
        )
        found.append(Share(behaviour.rate, behaviour.interval, behaviour.n))
    return found[0], found[1]


def control_rows(
    opened: Opened,
    config: RunConfig,
    result: DirectionResult,
    held_out: EvalSet,
    evaluation: EvalResult,
    *,
    progress: Progress | None = None,
) -> tuple[BehaviourRow, BehaviourRow]:
    """What the cut is to be compared with: a random direction, and adding instead of cutting.

    The random direction is a seeded unit Gaussian vector that goes through the same plan; if it
    changed behaviour as much, the cut would be damage and not an effect of the direction. The
    addition puts the raw difference back once, at its source, on harmless how-to requests; if
    they are refused, the direction does not only accompany refusal.
    """
    shared = _judging(opened, config)
    noise = mx.random.normal((result.d_model,), key=mx.random.key(config.seed))
    layers = _chosen_layers(config, result)
    random_cut = _plan(opened, config, layers, noise / mx.linalg.norm(noise), control=True)
    behaviour = measure_behaviour(
        opened.model,
        opened.tokenizer,
        list(held_out.harmful),
        interventions=random_cut.virtual(),
        progress=_part(progress, "random direction", len(held_out.harmful)),
        **shared,
    )
    pairs = evaluation.answers["harmless"]
    likelihood = compare_likelihood(
        opened.model,
        opened.tokenizer,
        [pair["prompt"] for pair in pairs],
        [pair["original"] for pair in pairs],
        interventions=random_cut.virtual(),
    )
    added = measure_behaviour(
        opened.model,
        opened.tokenizer,
        list(held_out.how_to),
        interventions=(Add.from_result(result, 1.0),),
        progress=_part(progress, "addition", len(held_out.how_to)),
        **shared,
    )
    return (
        BehaviourRow(
            "random direction",
            harmful_refused=Share(behaviour.rate, behaviour.interval, behaviour.n),
            degenerate=behaviour.degenerate,
            perplexity=likelihood.perplexity_modified,
            kl=likelihood.kl,
            note="the same cut with a random direction; behaviour should stay as it was.",
        ),
        BehaviourRow(
            "addition",
            harmless_refused=Share(added.rate, added.interval, added.n),
            degenerate=added.degenerate,
            note="no cut; the raw difference is added once at its source to how-to requests.",
        ),
    )


def comparison_rows(
    evaluation: EvalResult, contrast: tuple[Share | None, Share | None] = (None, None)
) -> tuple[BehaviourRow, BehaviourRow]:
    """The rows "before" and "cut" of an evaluation."""
    intervals = evaluation.intervals

    def share(name: str, rate: float, n: int) -> Share:
        return Share(rate, intervals[name], n)

    before = BehaviourRow(
        "before",
        share("refusal_rate_original", evaluation.refusal_rate_original, evaluation.num_prompts),
        share("over_refusal_original", evaluation.over_refusal_original, evaluation.num_harmless),
        contrast[0],
        evaluation.degenerate_original,
        evaluation.perplexity_original,
    )
    after = BehaviourRow(
        "cut",
        share("refusal_rate_modified", evaluation.refusal_rate_modified, evaluation.num_prompts),
        share("over_refusal_modified", evaluation.over_refusal_modified, evaluation.num_harmless),
        contrast[1],
        evaluation.degenerate_modified,
        evaluation.perplexity_modified,
        evaluation.kl_divergence,
    )
    return before, after


_BY_SCORE = ("above_median", "top_k")
_ADAPTER_HEAD = "an adapter cannot give the head a matrix of its own"
_SHARED = f"{_ADAPTER_HEAD}: the shared one is cut"


def _chosen_layers(config: RunConfig, result: DirectionResult) -> str | Sequence[int]:
    """The blocks to cut; those that are chosen by their scores as a list."""
    layers = config.cut.layers
    if layers in _BY_SCORE:
        return select_target_layers(result.cosine_scores, str(layers))
    return layers


def _plan(
    opened: Opened,
    config: RunConfig,
    layers: str | Sequence[int],
    direction: Any,
    *,
    control: bool = False,
) -> EditPlan:
    """The plan of the configuration. A `control` restores no norms, to have a run-time form.

    For an adapter, an "auto" that would untie the head cuts the shared matrix instead, as it does
    where the model's class cannot untie either.
    """
    settings = config.cut
    adapter = config.output.precision == "adapter"

    def planned(embedding: Any) -> EditPlan:
        return plan_cut(
            opened.model,
            direction,
            layers=layers,
            alpha=settings.alpha,
            components=settings.components,
            embedding=embedding,
            norm_preserve=None if control else settings.norm_preserve,
        )

    plan = planned(settings.embedding)
    if not adapter:
        return plan
    if settings.embedding == "auto" and plan.embedding == "untie":
        plan = replace(planned("tied"), notes=(*plan.notes, _SHARED))
    check_adaptable(plan)
    return plan


def _judging(opened: Opened, config: RunConfig) -> dict[str, Any]:
    """The configuration's arguments for `measure_behaviour`."""
    settings = config.eval
    judge = settings.refusal_mode == "judge"
    return {
        "max_tokens": settings.max_tokens,
        "phrases": settings.refusal_phrases,
        "verdict": model_judge(opened.model, opened.tokenizer) if judge else None,
    }


def _part(
    progress: Progress | None, stage: str, count: int, number: int = 0, parts: int = 1
) -> Progress | None:
    """The same callable under a stage's own name, for one of several equal parts of `count`."""
    if progress is None:
        return None
    progress(stage, number * count, parts * count)
    return lambda _, done, total: progress(stage, number * total + done, parts * total)


def _tell(progress: Progress | None, stage: str, done: int, total: int) -> None:
    if progress:
        progress(stage, done, total)


def model_name(path: str) -> str:
    """How people call a model: its Hub id, or the name of its folder."""
    return path if not Path(path).exists() else Path(path).resolve().name
