"""What a run prints: the header, the table, the samples, the next command to type.

Takes finished values and a console; decides wording and order.
"""

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import vauban
from vauban.cli.console import Console
from vauban.config import RunConfig
from vauban.evaluation import GateReport
from vauban.models import DeviceInfo, ForwardCheck, ModelInfo
from vauban.pipeline import EvalSet, PromptSet, RunPlan, RunResult
from vauban.report import (
    HEADINGS,
    LEGEND,
    BehaviourRow,
    Sample,
    byte_size,
    cells,
    contrast_line,
    decimal,
    interval_lines,
    off_target_sentence,
    quantity,
    seconds,
    shorten,
    verdict_lines,
    written_cut,
)


def header(console: Console, plan: RunPlan, choice: str | None = None) -> None:
    """What will run on what, before the long work starts.

    `choice` says how the cut is chosen, where that is not as the configuration says.
    """
    opened, config = plan.opened, plan.config
    layers = config.cut.layers
    blocks = f"{layers} layers" if isinstance(layers, str) else f"layers {layers}"
    layer = config.measure.layer
    how = {
        "answers": "layer chosen by short answers",
        "causal": "layer chosen by what cutting and adding do",
        "auto": "layer chosen by separation",
    }
    rows = [
        ("device", device_line(opened.device)),
        *model_lines(opened.info),
        ("forward pass", forward_line(opened.check)),
        ("prompts", prompts_line(plan)),
        ("held out", held_out_line(plan.held_out)),
        (
            "plan",
            (
                choice
                or (
                    f"go on from {config.measure.direction}, "
                    if config.measure.direction
                    else f"measure ({how.get(str(layer), f'block {layer}')}), "
                )
                + f"cut {_strength(config)} in {blocks}"
            )
            + f", compare, write {_what_is_written(config)}{config.output.dir}",
        ),
    ]
    console.pairs(f"vauban {vauban.__version__}", rows)


def _strength(config: RunConfig) -> str:
    alpha = config.cut.alpha
    return "at a strength chosen by short answers" if alpha == "auto" else f"α = {alpha:g}"


def _what_is_written(config: RunConfig) -> str:
    return "an adapter to " if config.output.precision == "adapter" else ""


def prompts_line(plan: RunPlan) -> str:
    """How many prompts are measured, and where they come from."""
    harmful, harmless = plan.harmful, plan.harmless
    if harmful.origin == harmless.origin != "configuration":
        return (
            f"{len(harmful.prompts)} harmful, {len(harmless.prompts)} harmless ({_origin(harmful)})"
        )
    return ", ".join(
        f"{len(prompts.prompts)} {label} ({_origin(prompts)})"
        for label, prompts in (("harmful", harmful), ("harmless", harmless))
    )


def held_out_line(held_out: EvalSet) -> str:
    kinds = ("harmful", "harmless", "contrast")
    parts = [f"{count} {kind}" for kind in kinds if (count := len(held_out.texts(kind)))]
    return f"{', '.join(parts)} ({_origin(held_out)})"


def _origin(prompts: PromptSet | EvalSet) -> str:
    places = {"model folder": "the model's own set", "bundled": "bundled with vauban"}
    return places.get(prompts.origin, prompts.source)


def device_line(device: DeviceInfo) -> str:
    name = device.name if device.backend == "cpu" else f"{device.name} ({device.backend})"
    return (
        f"{name}, {byte_size(device.memory_total)} memory, "
        f"{byte_size(device.memory_available)} free"
    )


def model_lines(info: ModelInfo) -> list[tuple[str, str]]:
    packed = info.quantization if info.quantization != info.stored_dtype else None
    runs = info.dtype + (f" with {packed} weights" if packed else "")
    if info.converted and info.stored_dtype != info.dtype:
        runs += f" (stored as {info.stored_dtype}, which this CPU computes slowly)"
    return [
        (
            "model",
            f"{_near(info.path)}: {info.model_type}, {info.n_layers} layers × {info.d_model}, "
            f"{quantity(info.parameters)} parameters, {byte_size(info.bytes)}",
        ),
        ("runs in", runs),
    ]


def _near(path: str) -> str:
    """A path relative to the current folder, where it lies below it."""
    folder = Path.cwd()
    return str(Path(path).relative_to(folder)) if Path(path).is_relative_to(folder) else path


def forward_line(check: ForwardCheck) -> str:
    path = "manual" if check.path == "manual" else "through the model's own layers"
    return f"{path}, verified: largest difference {decimal(check.max_difference, 2)}"


def outcome(console: Console, result: RunResult) -> None:
    """What came out, and what to type next."""
    run = result.document
    direction, export = run["direction"], run["export"]
    console.line()
    console.pairs(
        None,
        [
            (
                "direction",
                f"output of block {direction['layer_index']} (residual "
                f"{direction['residual_index']} of {run['model']['n_layers']}); class means "
                f"along it: harmless {decimal(direction['projections']['harmless'])}, harmful "
                f"{decimal(direction['projections']['harmful'])}",
            ),
            *chosen_lines(direction.get("provenance", {})),
            *strength_lines(run["strength"]),
            (
                "cut",
                f"{export['modules_edited']} residual writers; {written_cut(export)}"
                f"{kept_embedding(run['leak'])}",
            ),
        ],
    )
    table(console, result.rows)
    beside = off_target_sentence(run.get("off_target"))
    for line in (*verdict_lines(run["evaluation"]), beside):
        console.line(line)
    console.line()
    samples(console, result.samples)
    for text in result.warnings:
        console.warning(text)
    size = byte_size(run["export"]["bytes"])
    if run["cut"]["embedding"] == "untie":
        size += f"; the source has {byte_size(run['source_bytes'])}, and no matrix for the head"
    console.line(f"written to {result.output_dir} ({size}) in {seconds(result.seconds)}", "green")
    if result.gates is not None:
        gates(console, result.gates)
    console.line("next:")
    console.command(open_command(result.output_dir / "report.html"))
    console.command(next_command(result))


def open_command(page: Path) -> str:
    """The command that shows a page in the browser."""
    return f"{'open' if sys.platform == 'darwin' else 'xdg-open'} {shlex.quote(str(page))}"


def gates(console: Console, report: GateReport) -> None:
    """Every gate with the number that was compared; those that failed in red."""
    title, *lines = report.summary().splitlines()
    console.line(title, "green" if report.ok else "red")
    for line, result in zip(lines, report.results, strict=True):
        console.line(line, None if result.passed else "red")


def table(console: Console, rows: tuple[BehaviourRow, ...]) -> None:
    """The before/after table with its notes."""
    console.line()
    whole = [cells(row) for row in rows]
    if console.has_room(HEADINGS, whole):
        console.grid(HEADINGS, whole)
        console.line()
    else:
        console.grid(HEADINGS, [cells(row, intervals=False) for row in rows])
        console.line()
        for line in interval_lines(rows):
            console.line(line)
    for line in LEGEND:
        console.line(line, "dim")
    contrast = contrast_line(rows)
    if contrast:
        console.line(contrast)
    for row in rows:
        if row.note:
            console.line(f"{row.name}: {row.note}", "dim")
    console.line()


def samples(console: Console, chosen: tuple[Sample, ...]) -> None:
    """A few answers before and after, each on one line."""
    width = console.width - 10
    for sample in chosen:
        console.line(f"{sample.label:<8}  {shorten(sample.prompt, width)}", "bold")
        console.line(f"  before  {shorten(sample.original, width) or '(empty)'}")
        console.line(f"  after   {shorten(sample.modified, width) or '(empty)'}", "cyan")
    console.line()


def kept_embedding(leak: Mapping[str, Any]) -> str:
    """That the embedding goes on writing the direction, and how much of the stream that is."""
    if leak["embedding"] != "kept":
        return ""
    return (
        f"; the embedding is kept, so that up to {leak['stream']:.0%} of the stream still points "
        "along the direction"
    )


def strength_lines(chosen: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """How much is cut where, and what short answers said of it; [] where the user said it."""
    if not chosen:
        return []
    best, whole = chosen["trials"][0], chosen["strength"]
    parts = [f"{name} {_kernel(whole[name])}" for name in ("attention", "mlp")]
    return [
        (
            "strength",
            f"{', '.join(parts)}{', embedding' if whole['embedding'] else ''}; of "
            f"{chosen['tried']} {chosen.get('kind', 'shapes')}; {_short_answers(best)}",
        )
    ]


def _kernel(kernel: Mapping[str, Any]) -> str:
    if kernel["centre"] is None:
        return f"{kernel['peak']:g}"
    return f"up to {kernel['peak']:g} around block {kernel['centre']:.0f}"


def _short_answers(trial: Mapping[str, Any]) -> str:
    return (
        f"of {trial['prompts']} validation prompts {trial['refused']:.0%} refused, first-token KL "
        f"{decimal(trial['kl'], 2)}"
    )


def chosen_lines(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Why this direction: what answers or first tokens said of its cut; [] where neither did."""
    answers, selection = provenance.get("answers"), provenance.get("selection")
    if answers:
        best = answers["shortlist"][0]
        return [
            (
                "chosen",
                f"position {answers['position']}, of {len(answers['shortlist'])} on the shortlist; "
                f"at α = 1 {_short_answers(best)}",
            )
        ]
    if not selection:
        return []
    best, base = selection["kept"][0], selection["baseline"]
    offered = len(selection["kept"]) + len(selection["dropped"])
    return [
        (
            "chosen",
            f"position {selection['position']}, {len(selection['kept'])} of {offered} candidates "
            f"passed; log-odds of a refusal: harmful {base['harmful']:+.1f}, cut "
            f"{best['bypass']:+.1f}; harmless {base['harmless']:+.1f}, added "
            f"{best['induce']:+.1f}; KL of the cut on harmless {decimal(best['kl'], 2)}",
        )
    ]


def next_command(result: RunResult) -> str:
    """The command that lets the new model answer a prompt of the run, ready to be copied."""
    # Of the prompts whose answer changed, a short one in plain letters is easiest to type.
    harmful = [sample.prompt for sample in result.samples if sample.label == "harmful"]
    prompt = min(harmful, key=lambda text: (not text.isascii(), len(text)))
    written, run = str(result.output_dir), result.document
    places = ["--model", written]
    if run["export"]["precision"] == "adapter":
        places = ["--model", run["configuration"]["model"]["path"], "--adapter-path", written]
    return f"{_mlx_lm()} {shlex.join([*places, '--prompt', prompt])}"


def _mlx_lm() -> str:
    """mlx_lm.generate as it can be typed, also where the environment is not activated."""
    beside = Path(sys.executable).parent / "mlx_lm.generate"
    if not beside.exists():
        return f"{shlex.quote(sys.executable)} -m mlx_lm generate"
    on_path = shutil.which("mlx_lm.generate")
    if on_path and Path(on_path).resolve() == beside.resolve():
        return "mlx_lm.generate"
    return shlex.quote(_near(str(beside)))
