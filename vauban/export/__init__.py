"""Checkpoints on disk: staged, streamed, read back. Nothing else in vauban writes weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from vauban.edits import EditPlan, Rounding
from vauban.errors import InputError
from vauban.export.checkpoint import (
    draft_plan,
    draft_weights,
    open_source,
    write_edit_record,
    write_folder,
)
from vauban.export.staging import check_output, staged
from vauban.export.verify import ExportReport, verify_export
from vauban.models import model_folder

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
    draft = draft_weights(source, weights)
    with staged(output_dir, force=force, source=source.folder) as folder:
        write_folder(source, draft, folder)
    return Path(output_dir)


def write_plan(
    plan: EditPlan,
    model_path: str | Path,
    folder: Path,
    precision: str | None = None,
    *,
    rounding: Rounding = "two-sided",
) -> ExportReport:
    """Write the edited checkpoint into an existing folder, read it back, report.

    `precision` "same" (None): edited modules keep their storage format; packed ones are rounded
    direction-exactly, and where more than 0.1 % of the direction would be left the next wider
    format is taken, by name in the report. "8bit" packs edited modules with 8 bits, "float"
    stores them in the model's float type.
    """
    chosen = precision or "same"
    if chosen not in ("same", "8bit", "float"):
        raise InputError(f"precision is {precision!r}; expected 'same', '8bit' or 'float'")
    source = open_source(model_path)
    draft = draft_plan(source, plan, chosen, rounding)
    write_folder(source, draft, folder)
    write_edit_record(plan, source, draft, chosen, folder)
    return verify_export(folder, source=source.folder).check()


def export_plan(
    plan: EditPlan,
    model_path: str | Path,
    output_dir: str | Path,
    precision: str | None = None,
    force: bool = False,
) -> ExportReport:
    """`write_plan` into a new folder that appears complete or not at all."""
    with staged(output_dir, force=force, source=model_folder(model_path)) as folder:
        report = write_plan(plan, model_path, folder, precision)
    return dataclasses.replace(report, folder=str(output_dir))
