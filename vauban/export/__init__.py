"""Checkpoints on disk: staged, streamed, read back. Nothing else in vauban writes weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from vauban.edits import EditPlan
from vauban.errors import InputError
from vauban.export.checkpoint import (
    open_source,
    plan_entries,
    weight_entries,
    write_edit_record,
    write_folder,
)
from vauban.export.staging import check_output, staged
from vauban.export.verify import ExportReport, verify_export

__all__ = [
    "ExportReport",
    "check_output",
    "export_model",
    "export_plan",
    "staged",
    "verify_export",
    "write_plan",
]


def export_model(
    model_path: str | Path,
    weights: Mapping[str, mx.array],
    output_dir: str | Path,
    *,
    force: bool = False,
) -> Path:
    """Write `weights` as a complete folder that `mlx_lm.load` opens, and return its path.

    `weights` is a flat dictionary of every parameter, as `cut` returns it; `model_path` (a folder
    or Hub id) gives tokenizer and configuration. Modules that were packed there and are float
    here get their entry in the configuration.
    """
    source = open_source(model_path)
    entries, config = weight_entries(source, weights)
    with staged(output_dir, force=force, source=source.folder) as folder:
        write_folder(source, entries, config, folder)
    return Path(output_dir)


def write_plan(
    plan: EditPlan, model_path: str | Path, folder: Path, precision: str | None = None
) -> ExportReport:
    """Write the edited checkpoint into an existing folder, read it back, report.

    `precision`: "float" stores edited modules in the model's float type; "same" (the default for
    float models) keeps the storage format, which packed models do not offer yet; None chooses.
    """
    source = open_source(model_path)
    packed = any("scales" in module for _, module in source.model.named_modules())
    chosen = precision or ("float" if packed else "same")
    if chosen not in ("same", "float"):
        raise InputError(f"precision is {chosen!r}; expected 'same' or 'float'")
    if chosen == "same" and packed:
        raise InputError(
            "precision 'same' would round the direction back into packed weights; use 'float', "
            "which stores the edited modules unpacked"
        )
    entries, config = plan_entries(source, plan)
    write_folder(source, entries, config, folder)
    write_edit_record(plan, source, folder)
    report = verify_export(folder, source=source.folder)
    return dataclasses.replace(report, precision=chosen).check()


def export_plan(
    plan: EditPlan,
    model_path: str | Path,
    output_dir: str | Path,
    precision: str | None = None,
    force: bool = False,
) -> ExportReport:
    """`write_plan` into a new folder that appears complete or not at all."""
    from vauban.models import model_folder

    with staged(output_dir, force=force, source=model_folder(model_path)) as folder:
        report: Any = write_plan(plan, model_path, folder, precision)
    return dataclasses.replace(report, folder=str(output_dir))
