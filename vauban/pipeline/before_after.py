"""The rows of the before/after table: evaluation, over-refusal of contrast prompts, two controls.

Values in and values out, like the stages; nothing is written and nothing is printed.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from vauban._common import Progress
from vauban.config import RunConfig
from vauban.directions import DirectionResult
from vauban.edits import EditPlan
from vauban.evaluation import (
    Behaviour,
    EvalResult,
    OffTarget,
    answer_groups,
    answer_texts,
    compare_answers,
    evaluate,
    judge_answers,
    measure_off_target,
)
from vauban.interventions import Add, Intervention
from vauban.pipeline.cut_plan import ChosenStrength, control_plan
from vauban.pipeline.prompt_sets import EvalSet
from vauban.pipeline.stages import Opened, judge_of, tell
from vauban.report import BehaviourRow, Share


def evaluate_models(
    opened: Opened,
    modified: Any,
    config: RunConfig,
    held_out: EvalSet,
    *,
    beside: Sequence[Sequence[Intervention]] = (),
    progress: Progress | None = None,
) -> EvalResult:
    """`vauban.evaluate` with the settings of the configuration.

    Args:
        modified: a model, a plan or interventions, as `vauban.evaluate` takes them.
        beside: changes whose likelihood is measured in the same pass.
    """
    settings = config.eval
    tell(progress, "evaluate", 0, 2 * (len(held_out.harmful) + len(held_out.harmless)))
    return evaluate(
        opened.model,
        modified,
        opened.tokenizer,
        held_out.texts("harmful"),
        settings.refusal_phrases,
        settings.max_tokens,
        "judge" if opened.judge else settings.refusal_mode,
        harmless=held_out.texts("harmless"),
        judge=opened.judge,
        beside=beside,
        progress=progress,
    )


def off_target_stage(
    opened: Opened,
    plan: EditPlan,
    config: RunConfig,
    evaluation: EvalResult,
    *,
    progress: Progress | None = None,
) -> OffTarget:
    """What the cut changes beside refusal, on the answers to harmless prompts; JSON and turns where
    the configuration wants them."""
    rows = evaluation.answers["harmless"]
    found = compare_answers(
        [row["prompt"] for row in rows],
        [row["original"] for row in rows],
        [row["modified"] for row in rows],
    )
    if not config.eval.off_target:
        return found
    parts = measure_off_target(
        opened.model, opened.tokenizer, plan.virtual(), max_tokens=config.eval.max_tokens,
        progress=lambda _, done, n: tell(progress, "off target", done, n),
    )  # fmt: skip
    return replace(found, json=parts[0], turns=parts[1])


def random_cut(
    opened: Opened,
    config: RunConfig,
    result: DirectionResult,
    strength: ChosenStrength | None = None,
) -> tuple[Intervention, ...]:
    """A seeded unit Gaussian vector through the same plan as the direction, at run time."""
    noise = mx.random.normal((result.d_model,), key=mx.random.key(config.seed))
    plan = control_plan(opened, config, result, noise / mx.linalg.norm(noise), strength)
    return plan.virtual()


def control_stage(
    opened: Opened,
    plan: EditPlan,
    config: RunConfig,
    result: DirectionResult,
    held_out: EvalSet,
    evaluation: EvalResult,
    random_cut: Sequence[Intervention],
    *,
    progress: Progress | None = None,
) -> tuple[tuple[Share | None, Share | None], tuple[BehaviourRow, BehaviourRow]]:
    """Over-refusal of contrast prompts before and after (None where the file has none), and what
    the cut is to be compared with: a random direction, and adding instead of cutting.

    `evaluation` has the likelihood of `random_cut` beside its own. If the random direction changed
    behaviour as much, the cut would be damage and not an effect of the direction. The addition puts
    the raw difference back once, at its source, on harmless how-to requests; if they are refused,
    the direction does not only accompany refusal.
    """
    settings = config.eval
    addition = (Add.from_result(result, 1.0),)
    contrast = [((), "contrast"), (plan.virtual(), "contrast")] if held_out.contrast else []
    asked = [*contrast, (random_cut, "harmful"), (addition, "how_to")]
    groups = [(changes, held_out.texts(kind)) for changes, kind in asked]
    tell(progress, "controls", 0, sum(len(prompts) for _, prompts in groups))
    every = answer_groups(
        opened.model, opened.tokenizer, groups, max_tokens=settings.max_tokens,
        progress=lambda _, done, n: tell(progress, "controls", done, n),
    )  # fmt: skip
    *shares, behaviour, added = [
        judge_answers(
            prompts, answer_texts(opened.tokenizer, prompts, ids),
            phrases=settings.refusal_phrases, judge=judge_of(opened, config),
            finished=[len(answer) < settings.max_tokens for answer in ids],
        )
        for (_, prompts), ids in zip(groups, every, strict=True)
    ]  # fmt: skip
    likelihood = evaluation.beside[0]
    rows = (
        BehaviourRow(
            "random direction",
            harmful_refused=_share(behaviour),
            degenerate=behaviour.degenerate,
            perplexity=likelihood.perplexity_modified,
            perplexity_interval=likelihood.perplexity_modified_interval,
            kl=likelihood.kl,
            kl_interval=likelihood.kl_interval,
            note="the same cut with a random direction; behaviour should stay as it was."
            + _without_verdict(behaviour),
        ),
        BehaviourRow(
            "addition",
            harmless_refused=_share(added),
            degenerate=added.degenerate,
            note="no cut; the raw difference is added once at its source to how-to requests."
            + _without_verdict(added),
        ),
    )
    before, after = map(_share, shares) if shares else (None, None)
    return (before, after), rows


def comparison_rows(
    evaluation: EvalResult, contrast: tuple[Share | None, Share | None] = (None, None)
) -> tuple[BehaviourRow, BehaviourRow]:
    """The rows "before" and "cut" of an evaluation."""

    def row(name: str, side: str, contrast: Share | None, **kl: Any) -> BehaviourRow:
        def share(figure: str, kind: str) -> Share | None:
            pairs = evaluation.answers[kind]
            judged = sum(pair[f"refused_{side}"] is not None for pair in pairs)
            rate = getattr(evaluation, f"{figure}_{side}")
            interval = evaluation.intervals[f"{figure}_{side}"]
            return None if rate is None or interval is None else Share(rate, interval, judged)

        harmful = evaluation.answers["harmful"]
        return BehaviourRow(
            name,
            harmful_refused=share("refusal_rate", "harmful"),
            harmless_refused=share("over_refusal", "harmless"),
            contrast_refused=contrast,
            degenerate=sum(pair[f"degenerate_{side}"] for pair in harmful) / len(harmful),
            perplexity=getattr(evaluation, f"perplexity_{side}"),
            perplexity_interval=evaluation.intervals[f"perplexity_{side}"],
            **kl,
        )

    kl = {"kl": evaluation.kl_divergence, "kl_interval": evaluation.intervals["kl_divergence"]}
    return row("before", "original", contrast[0]), row("cut", "modified", contrast[1], **kl)


def _share(behaviour: Behaviour) -> Share | None:
    """A refusal rate for the table; None where no answer has a verdict."""
    if behaviour.rate is None or behaviour.interval is None:
        return None
    return Share(behaviour.rate, behaviour.interval, behaviour.judged)


def _without_verdict(behaviour: Behaviour) -> str:
    missing = behaviour.n - behaviour.judged
    return f" {missing} of {behaviour.n} answers have no verdict." if missing else ""
