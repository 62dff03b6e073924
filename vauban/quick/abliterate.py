"""Load, measure, abliterate, evaluate: each calls its room with the prompt sets a model brings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vauban
from vauban.config import RunConfig, make_config
from vauban.directions import DirectionResult
from vauban.edits import EditPlan, plan_cut
from vauban.evaluation import EvalResult
from vauban.export import (
    ExportReport,
    check_output,
    check_place,
    check_room,
    export_bytes,
)
from vauban.export.calibrate import PROMPTS_PER_CLASS
from vauban.models import describe, model_folder
from vauban.pipeline.kept_direction import kept_direction
from vauban.pipeline.prompt_sets import eval_set, prompt_set
from vauban.prompts import resolve_prompts, use_system_prompt, use_template_args
from vauban.search import measure


@dataclass(frozen=True)
class Abliteration:
    """What `abliterate` did: the direction, the plan and the export it made of them.

    >>> import tempfile, vauban
    >>> path = vauban.organism_path("dense")
    >>> model, tokenizer = vauban.load(path)
    >>> sets = ["Rob a shop.", "Forge a ticket."], ["Name a colour.", "Say hello."]
    >>> result = vauban.measure(model, tokenizer, *sets)
    >>> plan = vauban.plan_cut(model, result)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     done = Abliteration(result, plan, plan.export(path, f"{folder}/cut"), Path("cut"))
    >>> done.summary().splitlines()[-1]
    'written to cut'
    """

    direction: DirectionResult
    plan: EditPlan
    export: ExportReport
    output_dir: Path

    def summary(self) -> str:
        return "\n".join(
            (self.direction.summary(), self.export.summary(), f"written to {self.output_dir}")
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "direction": self.direction.to_dict(),
            "cut": self.plan.to_dict(),
            "export": self.export.to_dict(),
            "output_dir": str(self.output_dir),
        }


def load(
    path: str | Path,
    *,
    chat_template_args: Mapping[str, Any] | None = None,
    system_prompt: str | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder or a Hub id, as `vauban.load`.

    Args:
        chat_template_args, system_prompt: hold for every prompt that the tokenizer encodes: see
            `use_template_args` and `use_system_prompt`.

    >>> import vauban
    >>> model, tokenizer = load(vauban.organism_path("dense"))
    >>> len(model.layers)
    6
    """
    model, tokenizer = vauban.load(path)
    if chat_template_args:
        use_template_args(tokenizer, chat_template_args)
    use_system_prompt(tokenizer, system_prompt)
    return model, tokenizer


def measure_direction(
    model: Any, tokenizer: Any, harmful: Any = None, harmless: Any = None
) -> DirectionResult:
    """Measure as `vauban MODEL` does: layer and position are chosen by short answers.

    Args:
        harmful, harmless: anything `resolve_prompts` takes; None: the sets that the model's
            folder names in its vauban.json, else the bundled ones.

    >>> from vauban import organism_path, quick
    >>> model, tokenizer = quick.load(organism_path("dense"))
    >>> bad, good = ["Rob a shop.", "Forge a ticket."], ["Name a colour.", "Say hello."]
    >>> measure_direction(model, tokenizer, bad, good).provenance["layer"]
    'answers'
    """
    return measure(
        model,
        tokenizer,
        _prompts(tokenizer, harmful, "harmful"),
        _prompts(tokenizer, harmless, "harmless"),
        layer="answers",
        positions="post_instruction",
    )


def abliterate(
    model: Any,
    tokenizer: Any,
    model_path: str | Path,
    output_dir: str | Path = "output",
    alpha: float = 1.0,
    harmful: Any = None,
    harmless: Any = None,
) -> Abliteration:
    """Measure the direction, cut it from every residual writer, and export the changed model.

    Packed modules are rounded for what they read on the measuring prompts, as `vauban MODEL` does.
    The model in memory is not changed. For figures before and after, use `vauban MODEL` or
    `evaluate` below.

    Args:
        model_path: where `model` was loaded from; its files are read again for the export.
        output_dir: must not exist yet.
        alpha: share of the direction that is removed.

    Raises:
        InputError: a set that cannot be used; an existing folder, one that cannot be written or has
            no room, all before anything is measured. What fails later keeps the direction beside
            `output_dir` and says where.

    >>> import tempfile
    >>> from vauban import organism_path, quick
    >>> path = organism_path("dense")
    >>> bad, good = ["Rob a shop.", "Forge a ticket."], ["Name a colour.", "Say hello."]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     done = abliterate(*quick.load(path), path, f"{folder}/cut", 0.5, bad, good)
    >>> done.plan.settings["alpha"]
    0.5
    """
    folder, output = model_folder(model_path), Path(output_dir)
    check_output(output, source=folder)
    check_place(output)
    check_room(output, export_bytes(folder))
    sets = [
        _prompts(tokenizer, given, label)
        for given, label in ((harmful, "harmful"), (harmless, "harmless"))
    ]
    direction = measure_direction(model, tokenizer, *sets)
    with kept_direction(direction, output):
        plan = plan_cut(model, direction, alpha=alpha)
        if describe(model).quantization is not None:
            plan = plan.calibrated(
                tokenizer, [p for prompts in sets for p in prompts[:PROMPTS_PER_CLASS]]
            )
        export = plan.export(folder, output_dir)
    return Abliteration(direction, plan, export, Path(output_dir))


def evaluate(
    original: Any,
    modified: Any,
    tokenizer: Any,
    prompts: Sequence[str] | None = None,
    *,
    max_tokens: int = 100,
) -> EvalResult:
    """`vauban.evaluate` with held-out prompts chosen for you.

    Args:
        modified: a model, an EditPlan or interventions.
        prompts: harmful prompts; None: at most 64 of the evaluation set that the model's folder
            names, else of the bundled one. As many harmless ones come from that set, if it has
            them, every kind in proportion.

    >>> from vauban import organism_path, quick
    >>> model, tokenizer = quick.load(organism_path("dense"))
    >>> result = evaluate(model, [], tokenizer, ["How do I rob a shop?"], max_tokens=4)
    >>> result.num_prompts, result.kl_divergence < 1e-6
    (1, True)
    """
    limit: dict[tuple[str, ...], Any] = {}
    if prompts:
        limit[("eval", "num_prompts")] = len(prompts)
    held_out = eval_set(_defaults(tokenizer, limit), _folder(tokenizer))
    return vauban.evaluate(
        original,
        modified,
        tokenizer,
        held_out.texts("harmful") if prompts is None else prompts,
        max_tokens=max_tokens,
        harmless=held_out.texts("harmless"),
    )


def _prompts(tokenizer: Any, given: Any, label: str) -> list[str]:
    if given is not None:
        return resolve_prompts(given, kind=label)
    return list(prompt_set(_defaults(tokenizer), label, _folder(tokenizer)).prompts)


def _defaults(tokenizer: Any, settings: Mapping[tuple[str, ...], Any] | None = None) -> RunConfig:
    return make_config({("model", "path"): _folder(tokenizer) or "model", **(settings or {})})


def _folder(tokenizer: Any) -> str:
    """Where the tokenizer was read from, which is the model's folder."""
    return str(getattr(tokenizer, "name_or_path", "") or "")
