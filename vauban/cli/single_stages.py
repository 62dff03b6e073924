"""The verbs that do one stage of the pipeline: `measure`, `cut` and `evaluate`."""

import argparse
from pathlib import Path
from typing import Any

from vauban.cli import run_lines
from vauban.cli.console import Console
from vauban.cli.setting_flags import settings
from vauban.config import RunConfig, make_config
from vauban.directions import DirectionResult
from vauban.directions.direction_files import SUFFIXES, direction_path
from vauban.directions.measure import check_sets
from vauban.errors import InputError
from vauban.export import (
    check_control_vector,
    check_output,
    check_place,
    check_room,
    export_bytes,
    export_control_vector,
    is_adapter,
)
from vauban.models import check_tokenizer
from vauban.pipeline.before_after import comparison_rows, evaluate_models
from vauban.pipeline.cut_plan import calibrate_stage, check_plan, plan_stage
from vauban.pipeline.preflight import check_fits, check_layers, model_size, open_folder
from vauban.pipeline.prompt_sets import eval_set, prompt_set
from vauban.pipeline.stages import (
    gates_stage,
    measure_stage,
    open_configured,
    open_judge,
    open_model,
)
from vauban.report import decimal, pick_samples, verdict_lines


def measure(options: argparse.Namespace) -> int:
    """Measure a direction and save it."""
    config = _config(options)
    output = Path(options.output)
    if output.suffix not in SUFFIXES:
        raise InputError(
            f"-o {output}: directions are saved as FILE.safetensors, in a model's folder as "
            "FILE.vauban."
        )
    output = direction_path(output)
    if output.exists() and not options.force:
        raise InputError(f"{output} exists; name another file with -o, or --force to replace it.")
    if not output.parent.is_dir():
        raise InputError(f"{output}: the folder {output.parent} does not exist.")
    if options.gguf:
        check_control_vector(options.gguf)
        if Path(options.gguf).exists() and not options.force:
            raise InputError(f"{options.gguf} exists; name another file, or --force to replace it.")
    folder, model = open_folder(config.model.path)
    sets = {label: prompt_set(config, label, folder) for label in ("harmful", "harmless")}
    check_sets({label: list(one.prompts) for label, one in sets.items()})
    layers, size = model_size(model)
    if layers is not None:
        check_layers(config, layers)
    check_place(output)
    check_room(output, 16 * (layers or 1) * (size or 1))
    console = Console(as_json=options.json)
    with console.progress() as progress:
        opened = open_configured(config, progress=progress)
        result = measure_stage(opened, config, sets["harmful"], sets["harmless"], progress=progress)
    result.save(output)
    console.line(result.summary())
    console.grid(*_layer_table(result))
    console.line(f"saved to {output}", "green")
    if options.gguf:
        _save_control_vector(console, result, options.gguf, str(model["model_type"]))
    console.line("next:")
    console.command(f"vauban cut --model {config.model.path} --direction {output} -o output")
    console.document({**result.to_dict(), "saved_to": str(output)})
    return 0


def _save_control_vector(
    console: Console, result: DirectionResult, file: str, model_type: str
) -> None:
    """The direction as a GGUF file, and how llama.cpp adds it at the chosen block."""
    export_control_vector(result, file, model_type=model_type)
    console.line(f"control vector in {file}", "green")
    block = result.layer_index
    if block == 0:
        console.warning("llama.cpp adds nothing after block 0, where this direction was measured")
        return
    console.line("in llama.cpp, less than 0 to take it away:")
    console.command(
        f"llama-cli -m MODEL.gguf --control-vector-scaled {file}:1 "
        f"--control-vector-layer-range {block} {block}"
    )


def cut(options: argparse.Namespace) -> int:
    """Cut a saved direction from the weights."""
    config = _config(options)
    result = DirectionResult.load(options.direction)
    output = Path(config.output.dir)
    check_output(output, force=config.output.force, source=None)
    folder, model = open_folder(config.model.path)
    check_output(output, force=config.output.force, source=folder)
    sets = [prompt_set(config, label, folder) for label in ("harmful", "harmless")]
    layers, size = model_size(model)
    if layers is not None:
        check_layers(config, layers)
    check_fits(result, layers, size, config.model.path)
    check_place(output)
    check_room(output, export_bytes(folder, config.output.precision))
    console = Console(as_json=options.json)
    with console.progress() as progress:
        opened = open_configured(config, progress=progress)
        check_tokenizer(result, opened.tokenizer)
        check_plan(opened, config)
        plan = calibrate_stage(
            opened,
            config,
            plan_stage(opened, config, result),
            *sets,
            progress=progress,
        )
        report = plan.export(
            opened.folder,
            output,
            precision=config.output.precision,
            layout=config.output.layout,
            force=config.output.force,
            calibrate=False,  # `calibrate_stage` did, or was not to.
            progress=progress,
        )
    console.line(plan.summary())
    console.line(report.summary())
    console.line(f"written to {output}", "green")
    console.line("next:")
    console.command(f"vauban evaluate --model {config.model.path} --modified {output}")
    console.document({"cut": plan.to_dict(), "export": report.to_dict(), "output": str(output)})
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """Compare two models on held-out prompts."""
    config = _config(options)
    folder, _ = open_folder(config.model.path)
    held_out = eval_set(config, folder)
    if not is_adapter(options.modified):
        open_folder(options.modified)
    console = Console(as_json=options.json)
    with console.progress() as progress:
        opened = open_configured(config, progress=progress)
        opened = open_judge(opened, config, progress=progress)
        # An adapter is opened on the model it is compared with, for which it was written.
        on = options.modified if is_adapter(options.modified) else None
        changed = config.model.path if on else options.modified
        modified = open_model(changed, adapter=on, progress=progress)
        result = evaluate_models(opened, modified.model, config, held_out, progress=progress)
    run_lines.table(console, comparison_rows(result))
    for line in verdict_lines(result.to_dict()):
        console.line(line)
    run_lines.samples(console, tuple(pick_samples(result.answers)))
    for note in result.notes():
        console.warning(note)
    report = gates_stage(result, config)
    if report is not None:
        run_lines.gates(console, report)
    console.document({**result.to_dict(), "gates": report and report.to_dict()})
    return 0 if report is None or report.ok else 1


def _config(options: argparse.Namespace) -> RunConfig:
    return make_config(settings(options))


def _layer_table(result: DirectionResult) -> tuple[list[str], list[list[str]]]:
    """The per-layer scores that the result holds; the chosen layer is marked."""
    scores: dict[str, list[Any]] = {
        name: values
        for name, values in result.scores.items()
        if len(values) == len(result.cosine_scores)
    }
    rows = []
    for layer in range(len(result.cosine_scores)):
        mark = " *" if layer == result.layer_index else ""
        row = [f"block {layer}{mark}", decimal(float(result.norms[layer]))]
        rows.append(row + [decimal(float(values[layer])) for values in scores.values()])
    return ["output of", "raw norm", *scores], rows
