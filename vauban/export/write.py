"""Write a checkpoint folder: a planned edit, or a dictionary of weights.

Knows plans and files; rounds nothing itself (`vauban.edits.packed` does).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

import mlx.core as mx

from vauban._common import Progress, largest
from vauban.edits.packed import check_precision
from vauban.edits.plan import EditPlan
from vauban.errors import InputError
from vauban.export.adapter import adapter_shares, write_adapter
from vauban.export.calibrate import calibrate_from_folder
from vauban.export.checkpoint import draft_plan, draft_weights, write_folder
from vauban.export.disk import check_place, check_room, export_bytes
from vauban.export.edit_record import EARLIER_EDIT_FILE, EDIT_FILE, write_edit_record
from vauban.export.export_report import ExportReport
from vauban.export.interrupted import forget_record, read_record, resume_key
from vauban.export.layout import place
from vauban.export.model_match import check_plan_matches
from vauban.export.programs import MLX_LM, PEFT
from vauban.export.side_files import left_behind
from vauban.export.source import Source, open_source, source_folder
from vauban.export.staging import check_output, staged
from vauban.export.tensor_files import sha256
from vauban.export.verification import verify_export
from vauban.models import residual_writers


def export_model(
    model_path: str | Path,
    weights: Mapping[str, mx.array],
    output_dir: str | Path,
    *,
    force: bool = False,
    layout: str = "same",
) -> Path:
    """Write `weights` as a complete folder that `mlx_lm.load` opens, and return its path.

    `weights` is a flat dictionary of every parameter, as `cut` returns it; `model_path` (a folder
    or Hub id) gives tokenizer and configuration. Modules that were packed there and are float
    here get their entry in the configuration. `layout` as for `plan.export`.

    >>> import tempfile, mlx.core as mx, vauban
    >>> from mlx.utils import tree_flatten
    >>> source = vauban.organism_path("dense")
    >>> weights = dict(tree_flatten(vauban.load(source)[0].parameters()))
    >>> changed = vauban.cut(weights, mx.ones(128), "all")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     (export_model(source, changed, f"{folder}/cut") / "config.json").is_file()
    True
    """
    source = open_source(model_path)
    draft = draft_weights(source, weights)
    with staged(output_dir, force=force, source=source.folder) as folder:
        write_folder(source, draft, folder, layout=layout)
    return Path(output_dir).expanduser()


def write_plan(
    plan: EditPlan,
    model_path: str | Path,
    folder: Path,
    precision: str | None = None,
    *,
    layout: str = "same",
    progress: Progress | None = None,
) -> ExportReport:
    """Write the edited checkpoint into an existing folder, read it back, report.

    `precision` "same" (None): edited modules keep their storage format; packed ones are rounded
    direction-exactly, and where more than 0.1 % of the direction would be left the next wider
    format is taken, by name in the report. "8bit" packs edited modules with 8 bits, "float"
    stores them in the model's float type. "adapter" writes an mlx-lm LoRA folder of rank k per
    writer instead of a checkpoint, exact on any stored weights; InputError where a plan is no such
    change (`check_adaptable`).

    `layout` "same" keeps the names, shapes and files of the source: what no edit touches is copied
    byte for byte, whatever mlx-lm makes of it. "mlx" takes mlx-lm's, "hf" transformers'. What could
    not be kept stands in the report's notes.

    Shards that an earlier, killed run of the same export has finished there are kept. InputError
    before anything is written for a folder that holds another model, for settings that cannot be
    recorded, and for a plan whose model holds other weights than `model_path` stores (an adapter,
    weights that were changed in memory).
    """
    check_precision(precision)
    check_plan_matches(plan, model_path)
    return _write(plan, model_path, folder, precision, layout, progress)


def _write(
    plan: EditPlan,
    model_path: str | Path,
    folder: Path,
    precision: str | None,
    layout: str,
    progress: Progress | None,
) -> ExportReport:
    chosen = precision or "same"
    source = open_source(model_path)
    key = resume_key(plan, source.folder, chosen, layout)
    folder = _without_model(Path(folder).expanduser(), key)
    if chosen == "adapter":
        return _write_adapter(plan, source, folder)
    draft = draft_plan(source, plan, chosen, progress)
    placement = write_folder(source, draft, folder, key, layout)
    behind = left_behind(source.folder)
    notes = [*placement.notes, *([f"not copied: {', '.join(behind)}"] if behind else [])]
    write_edit_record(plan, source, draft, chosen, folder, placement, notes)
    report = verify_export(folder, source=source.folder, progress=progress).check()
    forget_record(folder)
    return report


def check_layout(
    plan: EditPlan, model_path: str | Path, precision: str | None, layout: str
) -> None:
    """InputError where `write_plan` would refuse the layout; computes and writes nothing."""
    source = open_source(model_path)
    draft = draft_plan(source, plan, precision or "same")
    place(source, draft.entries, draft.edited, draft.changed, layout)


def _without_model(folder: Path, key: str) -> Path:
    """`folder`; InputError where it is none, or holds a model other than a start of this export."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; expected an existing one to write into")
    if read_record(folder).get("key") != key:
        names = sorted(f.name for f in folder.iterdir())
        adapters = ("adapter_config.json", "adapters.safetensors")
        of_models = ("config.json", *adapters, EDIT_FILE, EARLIER_EDIT_FILE)
        in_the_way = [n for n in names if n in of_models or fnmatch(n, "model*.safetensors*")]
        if in_the_way:
            raise InputError(
                f"{folder} holds a model already ({in_the_way[0]}); write into an empty folder, or "
                "use export(..., force=True), which replaces a folder as a whole"
            )
    return folder


def _write_adapter(plan: EditPlan, source: Source, folder: Path) -> ExportReport:
    notes = write_adapter(plan, source, folder)
    left, missed = adapter_shares(plan, source, folder)
    written = sorted(f for f in folder.rglob("*") if f.is_file())
    report = ExportReport(
        folder=str(folder),
        direction_left=largest(left.values()),
        modules_edited=len(left),
        modules_present=len(residual_writers(plan.model)),
        untouched_identical=None,
        writers=left,
        missed=missed,
        expected_left=max(abs(1.0 - u.alpha) for u in plan.updates)
        if all(u.complete for u in plan.updates)
        else None,
        precision="adapter",
        stored={u.path: {"mode": "adapter", "rank": u.basis.shape[0]} for u in plan.updates},
        files={str(f.relative_to(folder)): sha256(f) for f in written},
        bytes=sum(f.stat().st_size for f in written),
        notes=notes,
        programs=(MLX_LM,) if notes else (MLX_LM, PEFT),
    )
    return report.check()


def _packs(plan: EditPlan, folder: Path) -> bool:
    """Whether a packed module of the checkpoint is edited."""
    modules = open_source(folder).modules
    return any("scales" in modules[u.path] for u in plan.updates if u.path in modules)


def export_plan(
    plan: EditPlan,
    model_path: str | Path,
    output_dir: str | Path,
    precision: str | None = None,
    force: bool = False,
    *,
    layout: str = "same",
    calibrate: bool | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """`write_plan` into a new folder that appears complete or not at all.

    `calibrate` as for `EditPlan.export`.
    """
    source = source_folder(model_path)
    check_output(output_dir, force=force, source=source)
    check_precision(precision)
    check_plan_matches(plan, source)
    check_place(output_dir)
    unties, rank = plan.embedding == "untie", int(plan.basis.shape[0])
    check_room(output_dir, export_bytes(source, precision, unties=unties, directions=rank))
    if precision in (None, "same") and _packs(plan, source):
        plan = calibrate_from_folder(plan, source, calibrate, progress)
    key = resume_key(plan, source, precision or "same", layout)
    with staged(output_dir, force=force, source=source, resume_key=key) as folder:
        report = _write(plan, model_path, folder, precision, layout, progress)
    return dataclasses.replace(report, folder=str(Path(output_dir).expanduser()))
