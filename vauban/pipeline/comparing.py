"""The changed model beside the original: evaluation, over-refusal, controls, and their rows.

Like the stages, values in and values out; nothing is written here and nothing is printed.
"""

from typing import Any

import mlx.core as mx

from vauban._common import Progress
from vauban.config import RunConfig
from vauban.directions import DirectionResult
from vauban.edits import EditPlan
from vauban.evaluation import EvalResult, compare_likelihood, evaluate, measure_behaviour
from vauban.evaluation.judge import model_judge
from vauban.interventions import Add
from vauban.pipeline.planning import control_plan
from vauban.pipeline.sources import EvalSet
from vauban.pipeline.stages import Opened, tell
from vauban.report import BehaviourRow, Share


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
    tell(progress, "evaluate", 0, 2 * (len(held_out.harmful) + len(held_out.harmless)))
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
    random_cut = control_plan(opened, config, result, noise / mx.linalg.norm(noise))
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
