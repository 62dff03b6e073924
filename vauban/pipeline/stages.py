"""The stages that a run and the single verbs share: open a model, measure, check the cut.

Each takes what the stage before it made and returns a value. Nothing is written and nothing is
printed; `progress` is called with (stage, done, total).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

import vauban
from vauban._arrays import floats
from vauban._common import Progress
from vauban.activations import stream_activations
from vauban.config import RunConfig, looks_like_hub_id
from vauban.directions import DirectionResult
from vauban.edits import EditPlan
from vauban.evaluation import (
    GateReport,
    LocalJudge,
    answer_tokens,
    check_gates,
    compare_likelihood,
)
from vauban.evaluation.judge import model_judge
from vauban.models import (
    DeviceInfo,
    ForwardCheck,
    ModelInfo,
    describe,
    device_info,
    model_folder,
    verify_forward,
)
from vauban.pipeline.prompt_sets import EvalSet, PromptSet
from vauban.prompts import encode_chat, use_system_prompt, use_template_args
from vauban.report import source_card
from vauban.search import measure


@dataclass(frozen=True)
class Opened:
    """A loaded model whose forward pass has been checked."""

    model: Any
    tokenizer: Any
    folder: Path
    """The folder of its files; for a Hub id the one in the Hub's cache."""
    info: ModelInfo
    device: DeviceInfo
    check: ForwardCheck
    judge: Any = None
    """A `LocalJudge` that has passed its check, where the configuration names one."""


def open_judge(opened: Opened, config: RunConfig, *, progress: Progress | None = None) -> Opened:
    """With the judge of the configuration, checked on the packaged answers.

    Raises CheckError, with its accuracy, for one that fails them.
    """
    if config.eval.judge is None:
        return opened
    tell(progress, "check the judge", 0, 1)
    judge = LocalJudge(*vauban.load(config.eval.judge))
    judge.passed()
    tell(progress, "check the judge", 1, 1)
    return replace(opened, judge=judge)


def judge_of(opened: Opened, config: RunConfig) -> Any:
    """Who judges answers: the judge that is named, the model itself, or None, the phrases."""
    if opened.judge is None and config.eval.refusal_mode == "judge":
        return model_judge(opened.model, opened.tokenizer)
    return opened.judge


def open_model(
    path: str,
    *,
    adapter: str | None = None,
    chat_template_args: Mapping[str, Any] | None = None,
    system_prompt: str | None = None,
    progress: Progress | None = None,
) -> Opened:
    """Load a model, with an adapter's folder on it or not, and check the manual forward pass.

    `chat_template_args` and `system_prompt` hold for every prompt that its tokenizer encodes from
    then on.

    Raises:
        InputError: the chat template does not read one of `chat_template_args`, or takes no system
            message.
        ModelError: the folder cannot be used.
        ArchitectureError: neither way of running the layers gives the model's own logits.
    """
    tell(progress, "load model", 0, 1)
    model, tokenizer = vauban.load(path, unpack=True, adapter_path=adapter)
    if chat_template_args:
        use_template_args(tokenizer, chat_template_args)
    if system_prompt is not None:
        use_system_prompt(tokenizer, system_prompt)
    tell(progress, "load model", 1, 1)
    tell(progress, "verify forward pass", 0, 1)
    check = verify_forward(model)
    tell(progress, "verify forward pass", 1, 1)
    return Opened(model, tokenizer, model_folder(path), describe(model), device_info(), check)


def open_configured(config: RunConfig, *, progress: Progress | None = None) -> Opened:
    """The model of a configuration, in the mode that it says. Raises as `open_model`."""
    return open_model(
        config.model.path,
        chat_template_args=config.model.chat_template_args,
        system_prompt=config.data.system_prompt,
        progress=progress,
    )


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
    tell(progress, "measure", 0, len(harmful.prompts) + len(harmless.prompts))
    positions = settings.positions
    if positions is None and settings.layer in ("causal", "answers"):
        positions = "post_instruction"
    return measure(
        opened.model,
        opened.tokenizer,
        list(harmful.prompts),
        list(harmless.prompts),
        settings.clip_quantile,
        method=settings.method,
        loud_multiple=settings.loud_multiple,
        layer=settings.layer,
        positions=tuple(positions) if isinstance(positions, list) else positions,
        batch_size=settings.batch_size,
        seed=config.seed,
        progress=progress,
    )


LEAK_PROMPTS = 16
"""Held-out prompts of each kind on which the stream is read after the edit."""

ADAPTER_HEAD = "an adapter cannot give the head a matrix of its own"

EXACT = 1e-3
"""A whole cut that leaves more than this share in the stream is not exact on this architecture."""


def leak_stage(
    opened: Opened, plan: EditPlan, held_out: EvalSet, *, progress: Progress | None = None
) -> dict[str, Any]:
    """The share of the direction that remains in the stream on held-out prompts under the cut.

    Where the head shares the embedding for good, also the KL that the changed head alone costs.
    """
    texts = held_out.texts("harmless", LEAK_PROMPTS)
    prompts = [*held_out.texts("harmful", LEAK_PROMPTS), *texts]
    tokens = [encode_chat(opened.tokenizer, prompt) for prompt in prompts]
    leak: dict[str, Any] = {
        "prompts": len(prompts),
        "stream": plan.stream_leak(opened.model, tokens),
        "whole": plan.is_whole,
        "embedding": plan.embedding,
    }
    alone = plan.head_alone()
    if alone:
        answers = answer_tokens(
            opened.model, opened.tokenizer, texts, max_tokens=32, progress=progress
        )
        leak["head_kl"] = compare_likelihood(
            opened.model, opened.tokenizer, texts, answers, interventions=alone, progress=progress
        ).kl
    return leak


def projection_stage(
    opened: Opened,
    plan: EditPlan,
    result: DirectionResult,
    held_out: EvalSet,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Held-out prompts' projections on the direction where it was measured, before and after.

    {"before" | "after": {"harmful" | "harmless": one number a prompt, relative to zero}}.
    """
    texts = {label: held_out.texts(label) for label in ("harmful", "harmless")}
    direction = result.direction.astype(mx.float32)
    total, done = 2 * sum(map(len, texts.values())), 0
    document: dict[str, Any] = {}
    for state, changes in (("before", ()), ("after", plan.virtual())):
        document[state] = {}
        for label, prompts in texts.items():
            along = [0.0] * len(prompts)
            for rows, values in stream_activations(
                opened.model, opened.tokenizer, prompts, positions=(result.position,),
                interventions=changes,
            ):  # fmt: skip
                numbers = floats(values[:, result.residual_index, 0] @ direction)
                for row, number in zip(rows, numbers, strict=True):
                    along[row] = number
                done += len(rows)
                tell(progress, "project", done, total)
            document[state][label] = along
    return document


def leak_warnings(leak: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Sentences on figures of `leak_stage` that a reader has to know."""
    notes = []
    if leak["whole"] and not leak["stream"] <= EXACT:  # NaN is not exact either
        notes.append(
            f"this architecture cannot be cut exactly: up to {leak['stream']:.1%} of the stream "
            "still points along the direction on held-out prompts"
        )
    if "head_kl" in leak:
        adapter = config.output.precision == "adapter"
        why = ADAPTER_HEAD if adapter else "the head shares the embedding matrix for good"
        notes.append(
            f"{why}, so cutting the embedding changes the head too; "
            f"that alone costs a KL of {leak['head_kl']:.4f} on harmless answers"
        )
    return notes


def gates_stage(figures: Any, config: RunConfig) -> GateReport | None:
    """The gates of the configuration; None without any.

    One that cannot be checked fails and says why, so that what was measured is not lost.
    """
    table = {name: gate for name, gate in config.gates.to_dict().items() if gate is not None}
    return check_gates(figures, table, strict=False) if table else None


def tell(progress: Progress | None, stage: str, done: int, total: int) -> None:
    """Call `progress` where there is one."""
    if progress:
        progress(stage, done, total)


def model_name(path: str) -> str:
    """A model's Hub id, or the name of its folder."""
    return path if not Path(path).exists() else Path(path).resolve().name


def model_facts(opened: Opened, given: str) -> dict[str, Any]:
    """What a run document says of its model: sizes, names, and what its card hands on."""
    folder = opened.folder
    return {
        **asdict(opened.info),
        "name": model_name(given),
        "hub_id": given if looks_like_hub_id(given) and not Path(given).exists() else None,
        "revision": folder.name if folder.parent.name == "snapshots" else None,
        "card": source_card(folder),
    }
