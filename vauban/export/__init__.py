"""Checkpoints on disk: staged, streamed, read back. Nothing else in vauban writes weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from vauban.edits import EditPlan, Rounding
from vauban.edits.storing import PRECISIONS
from vauban.errors import InputError
from vauban.export.adapter import adapter_left, check_adaptable, is_adapter, write_adapter
from vauban.export.checkpoint import (
    Source,
    draft_plan,
    draft_weights,
    open_source,
    write_edit_record,
    write_folder,
)
from vauban.export.resume import RECORD, resume_key, start_record
from vauban.export.staging import check_output, staged
from vauban.export.tensors import sha256
from vauban.export.verify import ExportReport, logits_difference, verify_export
from vauban.models import model_folder, residual_writers

__all__ = [
    "RECORD",
    "ExportReport",
    "check_adaptable",
    "check_output",
    "export_model",
    "export_plan",
    "is_adapter",
    "logits_difference",
    "resume_key",
    "staged",
    "start_record",
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
    stores them in the model's float type. "adapter" writes an mlx-lm LoRA folder of rank k per
    writer instead of a checkpoint, exact on any stored weights; InputError where a plan is no such
    change (`check_adaptable`).
    """
    chosen = precision or "same"
    if chosen not in PRECISIONS:
        raise InputError(f"precision is {precision!r}; expected one of {PRECISIONS[1:]}")
    source = open_source(model_path)
    if chosen == "adapter":
        return _write_adapter(plan, source, folder)
    draft = draft_plan(source, plan, chosen, rounding)
    key = resume_key(plan, source.folder, chosen, rounding=rounding)
    write_folder(source, draft, folder, key)
    write_edit_record(plan, draft, chosen, folder)
    return verify_export(folder, source=source.folder).check()


def _write_adapter(plan: EditPlan, source: Source, folder: Path) -> ExportReport:
    write_adapter(plan, source, folder)
    left = adapter_left(plan, source, folder)
    files = {f.name: sha256(f) for f in sorted(folder.iterdir())}
    report = ExportReport(
        folder=str(folder),
        direction_left=max(left.values()),
        modules_edited=len(left),
        modules_present=len(residual_writers(plan.model)),
        untouched_identical=None,
        writers=left,
        expected_left=max(abs(1.0 - u.alpha) for u in plan.updates)
        if all(u.complete for u in plan.updates)
        else None,
        precision="adapter",
        stored={u.path: {"mode": "adapter", "rank": u.basis.shape[0]} for u in plan.updates},
        files=files,
        bytes=sum(f.stat().st_size for f in folder.iterdir()),
    )
    return report.check()


def export_plan(
    plan: EditPlan,
    model_path: str | Path,
    output_dir: str | Path,
    precision: str | None = None,
    force: bool = False,
) -> ExportReport:
    """`write_plan` into a new folder that appears complete or not at all."""
    source = model_folder(model_path)
    key = resume_key(plan, source, precision or "same")
    with staged(output_dir, force=force, source=source, resume_key=key) as folder:
        report = write_plan(plan, model_path, folder, precision)
    return dataclasses.replace(report, folder=str(output_dir))
