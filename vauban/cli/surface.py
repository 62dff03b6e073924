"""The verb that maps where a model refuses: `surface MODEL`."""

import argparse
import json
from pathlib import Path
from typing import Any

from vauban.cli.console import Console
from vauban.cli.setting_flags import settings
from vauban.config import RunConfig, make_config
from vauban.directions import DirectionResult
from vauban.edits import plan_cut
from vauban.errors import InputError
from vauban.evaluation import AXES, Cell, SurfaceComparison, SurfaceScan, Threshold
from vauban.export import check_output, staged
from vauban.pipeline.prompt_sets import prompt_set
from vauban.pipeline.stages import measure_stage, open_configured
from vauban.pipeline.surface_stage import surface_rows, surface_stage, write_surface
from vauban.report import decimal, json_safe, rate_with_interval


def surface(options: argparse.Namespace) -> int:
    """Print a map of refusal, of its thresholds, and what it covers; 0 whatever it shows."""
    config = _config(options)
    axes = _axes(options.axes)
    output = Path(options.output_dir) if options.output_dir else None
    if output is not None:
        check_output(output, force=options.force, source=None)
    saved = DirectionResult.load(options.direction) if options.direction else None
    if config.surface.rows is not None:
        surface_rows(config, None)
    console = Console(as_json=options.json)
    with console.progress() as progress:
        opened = open_configured(config, progress=progress)
        rows = surface_rows(config, opened.folder)
        harmful, harmless = (
            prompt_set(config, label, opened.folder) for label in ("harmful", "harmless")
        )
        result = saved or measure_stage(opened, config, harmful, harmless, progress=progress)
        changes = plan_cut(opened.model, result).virtual() if options.cut else None
        mapped = surface_stage(
            opened, config, result, rows, harmful, harmless, changes, progress=progress
        )
    scan = mapped.before if isinstance(mapped, SurfaceComparison) else mapped
    _print(console, mapped, scan, axes)
    document = {"model": config.model.path, **mapped.to_dict()}
    if output is not None:
        with staged(output, force=options.force, source=opened.folder) as folder:
            text = json.dumps(json_safe(document), indent=1, ensure_ascii=False)
            (folder / "surface.json").write_text(text + "\n", encoding="utf-8")
            missing = write_surface(folder, mapped)
        if missing:
            console.warning(f"no maps: {missing}")
        console.line(f"written to {output}", "green")
    console.document(document)
    return 0


def _config(options: argparse.Namespace) -> RunConfig:
    """The flags as a configuration; the direction is read at the template's end."""
    return make_config(
        {
            ("measure", "layer"): "auto",
            **settings(options),
            ("model", "path"): options.model,
            ("surface", "max_tokens"): options.max_tokens,
        }
    )


def _axes(text: str) -> list[str]:
    axes = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [axis for axis in axes if axis not in AXES]
    if wrong or len(axes) not in (1, 2):
        raise InputError(f"--axes {text}: expected one or two of {', '.join(AXES)}")
    return axes


def _print(
    console: Console, mapped: SurfaceScan | SurfaceComparison, scan: SurfaceScan, axes: list[str]
) -> None:
    if isinstance(mapped, SurfaceComparison):
        changed = mapped.cells(*axes)
        console.grid(
            [*axes, "rows", "refused before", "after", "only before / after"],
            [
                [*_values(c.before), str(sum(c.before.counts.values())), _rate(c.before),
                 _rate(c.after),
                 f"{c.paired.only_before} / {c.paired.only_after}" if c.paired else "–"]
                for c in changed
            ],
            texts=len(axes),
        )  # fmt: skip
    else:
        console.grid(
            [*axes, "rows", "refused", "harmfulness", "refusal"],
            [
                [*_values(c), str(sum(c.counts.values())), _rate(c), _number(c.harmfulness),
                 _number(c.refusal)]
                for c in scan.cells(*axes)
            ],
            texts=len(axes),
        )  # fmt: skip
    covered = scan.coverage(*axes)
    console.line(
        f"brackets: 95% Wilson intervals; {covered.filled} of {covered.possible} possible cells "
        "hold rows",
        "dim",
    )
    console.line()
    for along, words in (
        ("refusal", "the projection at the template's end"),
        ("harmfulness", "the projection at the instruction's end"),
        ("harm", "the rows' grade of harm"),
    ):
        fit = scan.threshold(along=along)
        if isinstance(fit, Threshold):
            at = "nowhere along" if fit.value is None else f"at {decimal(fit.value)} of"
            console.line(f"half are refused {at} {words}; AUC {fit.auc:.3f}")
    for line in mapped.summary().splitlines():
        console.line(line)


def _values(cell: Cell) -> list[str]:
    return [f"{v:g}" if isinstance(v, int | float) else str(v) for v in cell.values.values()]


def _rate(cell: Cell) -> str:
    if cell.rate is None or cell.interval is None:
        return f"{cell.refused} of {cell.judged}"
    return rate_with_interval(cell.rate, cell.interval)


def _number(value: Any) -> str:
    return "–" if value is None else decimal(value)
