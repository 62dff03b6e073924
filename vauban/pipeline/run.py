"""The order of a run: measure, cut, compare, write, read back.

Everything is compared at run time before a byte is written; then the folder is built beside its
final place, checked from the file, and renamed. Prints nothing.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vauban.config import RunConfig
from vauban.directions import DirectionResult
from vauban.edits import EditPlan
from vauban.evaluation import EvalResult, GateReport
from vauban.export import ExportReport, logits_difference, resume_key, staged
from vauban.models import weight_files
from vauban.pipeline.before_after import (
    comparison_rows,
    control_stage,
    evaluate_models,
    off_target_stage,
    random_cut,
)
from vauban.pipeline.cut_plan import (
    ChosenStrength,
    calibrate_stage,
    check_plan,
    plan_stage,
    strength_stage,
)
from vauban.pipeline.kept_direction import kept_direction
from vauban.pipeline.preflight import Preflight, check_fits, check_layers, preflight
from vauban.pipeline.prompt_sets import EvalSet, PromptSet, overlap_warning
from vauban.pipeline.provenance import hash_files, system, versions
from vauban.pipeline.stages import (
    Opened,
    Progress,
    gates_stage,
    leak_stage,
    leak_warnings,
    measure_stage,
    model_facts,
    open_configured,
    open_judge,
    projection_stage,
)
from vauban.pipeline.surface_stage import surface_rows, surface_stage, write_surface
from vauban.report import (
    BehaviourRow,
    Sample,
    Share,
    json_safe,
    model_card,
    pick_samples,
    plain_table,
    refusal_statement,
    write_report,
)
from vauban.search.trials import REFUSES_FROM

FORMAT = 1
"""The version of run.json's layout."""


@dataclass(frozen=True)
class RunPlan:
    """What the header shows: known once the model is loaded, before the long work starts."""

    opened: Opened
    harmful: PromptSet
    harmless: PromptSet
    held_out: EvalSet
    config: RunConfig
    started: float
    """`time.monotonic()` when the run began."""
    checked: Preflight
    """What was known before the model was loaded."""


@dataclass(frozen=True)
class RunResult:
    """A finished run. `document` is what run.json holds."""

    output_dir: Path
    document: Mapping[str, Any]
    rows: tuple[BehaviourRow, ...]
    samples: tuple[Sample, ...]
    warnings: tuple[str, ...]
    seconds: float
    """Wall time of the whole run."""
    gates: GateReport | None = None
    """None where the configuration names no gates."""

    def to_dict(self) -> dict[str, Any]:
        """The run document with the output folder and the wall time, JSON-safe."""
        return {
            **self.document,
            "output_dir": str(self.output_dir),
            "seconds": round(self.seconds, 2),
        }

    def summary(self) -> str:
        """The before/after table, the warnings and the folder, as plain lines."""
        lines = [plain_table(self.rows)]
        lines += [f"warning: {text}" for text in self.warnings]
        lines += [self.gates.summary()] if self.gates else []
        lines.append(f"written to {self.output_dir}")
        return "\n".join(lines)


def run(
    config: RunConfig,
    *,
    progress: Progress | None = None,
    on_plan: Callable[[RunPlan], None] | None = None,
) -> RunResult:
    """Measure a direction, cut it, compare before and after, and export the changed model.

    Args:
        config: what to do (`vauban.config.load_config` or `make_config`).
        progress: called with (stage, done, total).
        on_plan: called once, after the model is loaded.

    What can be known is checked before the model is loaded (`preflight`). A measured direction is
    saved beside the output until the folder is complete (`kept_direction`); with `[measure]
    direction` a run goes on from such a file and measures nothing.

    Raises:
        InputError: a prompt file, an option or the output folder is not what it has to be.
        ModelError, ArchitectureError: the model cannot be loaded or walked correctly.
        CheckError: what was written is not what was meant; nothing is left behind then.
    """
    plan_of_run = open_run(config, progress=progress, on_plan=on_plan)
    opened, measuring = plan_of_run.opened, (plan_of_run.harmful, plan_of_run.harmless)
    result = plan_of_run.checked.direction
    if result is None:
        result = measure_stage(opened, config, *measuring, progress=progress)
        keeping: AbstractContextManager[Any] = kept_direction(result, Path(config.output.dir))
    else:
        keeping = nullcontext()
    with keeping:
        strength = strength_stage(opened, config, result, *measuring, progress=progress)
        return finish_run(plan_of_run, result, strength, progress=progress)


def open_run(
    config: RunConfig,
    *,
    progress: Progress | None = None,
    on_plan: Callable[[RunPlan], None] | None = None,
) -> RunPlan:
    """Check what can be known beforehand, load the model and read the prompt sets; as `run`."""
    started = time.monotonic()
    checked = preflight(config)
    opened = open_configured(config, progress=progress)
    info = opened.info
    check_layers(config, info.n_layers)
    if checked.direction is not None:
        check_fits(checked.direction, info.n_layers, info.d_model, config.model.path)
    check_plan(opened, config)
    opened = open_judge(opened, config, progress=progress)
    plan_of_run = RunPlan(
        opened, checked.harmful, checked.harmless, checked.held_out, config, started, checked
    )
    if on_plan:
        on_plan(plan_of_run)
    return plan_of_run


def finish_run(
    plan_of_run: RunPlan,
    result: DirectionResult,
    strength: ChosenStrength | None,
    *,
    sections: Mapping[str, Any] | None = None,
    write_more: Callable[[Path], None] | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Cut what was chosen, compare before and after, export.

    `sections` stand in run.json beside its own; `write_more` puts further files into the folder
    before it gets its name. Raises as `run`.
    """
    opened, config, held_out = plan_of_run.opened, plan_of_run.config, plan_of_run.held_out
    output, source = Path(config.output.dir), opened.folder
    plan = plan_stage(opened, config, result, strength)
    plan = calibrate_stage(
        opened, config, plan, plan_of_run.harmful, plan_of_run.harmless, progress=progress
    )
    leak = leak_stage(opened, plan, held_out, progress=progress)
    projections = projection_stage(opened, plan, result, held_out, progress=progress)
    controlled = config.eval.controls
    random = random_cut(opened, config, result, strength) if controlled else ()
    evaluation = evaluate_models(
        opened, plan, config, held_out, beside=[random] if controlled else [], progress=progress
    )
    beside = off_target_stage(opened, plan, config, evaluation, progress=progress)
    contrast: tuple[Share | None, Share | None] = (None, None)
    controls: tuple[BehaviourRow, ...] = ()
    if controlled:
        contrast, controls = control_stage(
            opened, plan, config, result, held_out, evaluation, random, progress=progress
        )
    rows = (*comparison_rows(evaluation, contrast), *controls)
    surface = None
    if config.surface.scan:
        surface = surface_stage(
            opened, config, result, surface_rows(config, source), plan_of_run.harmful,
            plan_of_run.harmless, plan.virtual(), progress=progress,
        )  # fmt: skip
    warnings = (
        *_warnings(plan_of_run, result, rows[0]),
        *leak_warnings(leak, config),
        *evaluation.notes(),
    )
    source_hashes = hash_files(
        weight_files(Path(source)).files, stage="hash the source", progress=progress
    )

    layout = config.output.layout
    key = resume_key(plan, source, config.output.precision, layout)
    with staged(output, force=config.output.force, source=source, resume_key=key) as folder:
        report = plan.write(
            source, folder, precision=config.output.precision, layout=layout, progress=progress
        )
        document = _document(plan_of_run, result, plan, evaluation, report, rows, warnings)
        document |= {"leak": leak, "projections": projections, "off_target": beside.to_dict()}
        document["strength"] = strength and strength.to_dict()
        document |= sections or {}
        document["export"]["logits_difference"] = logits_difference(folder, plan, source)
        document["files"] = {"source": source_hashes, "written": report.files}
        document["source_bytes"] = sum((Path(source) / n).stat().st_size for n in source_hashes)
        document["surface"] = surface and surface.to_dict()
        gates = gates_stage(document, config)
        document["gates"] = gates and gates.to_dict()
        samples = tuple(pick_samples(evaluation.answers))
        result.save(folder / "direction.vauban")
        _write_answers(folder / "answers.jsonl", evaluation)
        no_picture = write_surface(folder, surface) if surface else None
        _write_json(folder / "run.json", document)
        (folder / "README.md").write_text(model_card(document, rows, samples), encoding="utf-8")
        if write_more:
            write_more(folder)
    # The page is drawn from the finished folder: a fault in it costs no run.
    write_report(output)
    span = time.monotonic() - plan_of_run.started
    warnings = (*warnings, *report.notes)
    if no_picture:
        warnings = (*warnings, f"no maps of the surface: {no_picture}")
    return RunResult(output, document, rows, samples, warnings, span, gates)


def _warnings(plan: RunPlan, result: DirectionResult, before: BehaviourRow) -> tuple[str, ...]:
    texts = [
        refusal_statement(before, REFUSES_FROM),
        *result.warnings,
        overlap_warning((plan.harmful, plan.harmless), plan.held_out),
    ]
    return tuple(text for text in texts if text)


def _document(
    plan_of_run: RunPlan,
    result: DirectionResult,
    plan: EditPlan,
    evaluation: EvalResult,
    report: ExportReport,
    rows: Sequence[BehaviourRow],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """Everything in run.json but the hashes. It holds no times: the same run, the same bytes."""
    opened, config = plan_of_run.opened, plan_of_run.config
    return {
        "format": FORMAT,
        "name": Path(config.output.dir).resolve().name,
        "configuration": config.to_dict(),
        "seeds": {"run": config.seed},
        "versions": versions(),
        "platform": {**system(), "device": opened.device.name, "backend": opened.device.backend},
        "model": {
            **model_facts(opened, config.model.path),
            "forward": asdict(opened.check),
        },
        "prompts": {
            "harmful": plan_of_run.harmful.to_dict(),
            "harmless": plan_of_run.harmless.to_dict(),
            "eval": plan_of_run.held_out.to_dict(),
        },
        "direction": {**result.to_dict(), "norm": float(result.norms[result.layer_index])},
        "cut": plan.to_dict(),
        "behaviour": [row.to_dict() for row in rows],
        "evaluation": evaluation.to_dict(),
        "export": report.to_dict(),
        "warnings": list(warnings),
    }


def _write_answers(path: Path, evaluation: EvalResult) -> None:
    with path.open("w", encoding="utf-8") as stream:
        for label, pairs in evaluation.answers.items():
            for pair in pairs:
                stream.write(json.dumps({"label": label, **pair}, ensure_ascii=False) + "\n")


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(json_safe(document), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
