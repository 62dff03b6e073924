"""Read back what was written: how much of the direction is left, and that nothing else changed."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from vauban._common import Progress, largest
from vauban.edits.lowrank import share
from vauban.edits.plan import EditPlan
from vauban.edits.update import is_table
from vauban.errors import CheckError, InputError
from vauban.export.adapter import is_adapter
from vauban.export.compare_logits import compare_logits
from vauban.export.edit_record import read_edit_record
from vauban.export.export_report import ExportReport
from vauban.export.interrupted import RECORD
from vauban.export.read_back import norm, rows_along
from vauban.export.source import Source, open_source
from vauban.export.tensor_files import sha256
from vauban.models import residual_writers


def verify_export(
    output_dir: str | Path,
    *,
    source: str | Path | None = None,
    plan: EditPlan | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Reopen an exported folder and report what is left of the direction, per writer.

    Reads `edit.vauban`, which every planned export carries, and compares what each writer and
    each bias writes with what was planned for it. With `source` the tensors that were not edited
    are compared byte by byte, a head that was untied with the table it was given. With `plan` the
    folder is loaded as a model and its logits on a probe compared with the run-time cut of the
    plan's model.

    Raises InputError when the folder is no export of a plan, or an adapter, CheckError where an
    edited module is not in it.

    >>> import tempfile, mlx.core as mx, vauban
    >>> source = vauban.organism_path("dense")
    >>> model, _ = vauban.load(source)
    >>> plan = vauban.plan_cut(model, mx.ones(128), alpha=0.5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = plan.export(source, f"{folder}/half")
    ...     report = verify_export(f"{folder}/half", source=source)
    >>> report.ok, report.untouched_identical, round(report.direction_left, 1)
    (True, True, 0.5)
    """
    folder = Path(output_dir).expanduser()
    if is_adapter(folder):
        raise InputError(
            f"{folder} is an adapter, which holds no weights to read; load its model with it "
            "(vauban.load(source, adapter_path=...)) and evaluate that"
        )
    arrays, facts = read_edit_record(folder)
    written = open_source(folder)
    present = len(residual_writers(written.model))
    left: dict[str, float] = {}
    missed: dict[str, float] = {}
    exact = True
    for number, entry in enumerate(facts["writers"], 1):
        path = entry["path"]
        if path not in written.modules:
            raise CheckError(f"{folder}: the edited module {path} is not in the written model")
        module = written.modules[path]
        exact = exact and module.weight.dtype == mx.float32
        offset = arrays.get(f"offset.{path}")
        rows = rows_along(
            module, arrays[f"basis.{path}"], is_table(entry["layer"], entry["kind"]), offset
        )
        planned = arrays.get(f"planned.{path}")
        had = facts["before"][path]
        left[path] = share(norm(rows), had)
        missed[path] = left[path] if planned is None else share(norm(rows - planned), had)
        bias = arrays.get(f"bias.{path}")
        if bias is not None:
            name = f"{path}.bias"
            missed[name] = share(_apart(written, name, bias), facts["before"][name])
        written.release(path)
        if progress:
            progress("read back", number, len(facts["writers"]))
    untied = facts["writers"][0]["path"] if facts["embedding"] == "untie" else None
    layout = facts.get("layout", "same")
    differs = None
    if source is not None:
        differs = _difference(open_source(source), written, {*left}, untied, layout)
    report = ExportReport(
        folder=str(folder),
        direction_left=largest(left.values()),
        modules_edited=len(left),
        modules_present=present,
        untouched_identical=None if source is None else differs is None,
        writers=left,
        missed=missed,
        expected_left=max(abs(1.0 - e["alpha"]) for e in facts["writers"])
        if all(e["complete"] for e in facts["writers"])
        else None,
        precision=facts["precision"],
        stored=facts["stored"],
        files={f.name: sha256(f) for f in sorted(folder.glob("model*.safetensors"))},
        bytes=sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and f.name != RECORD),
        differs=differs,
        layout=layout,
        notes=tuple(facts.get("notes_on_files", ())),
        programs=tuple(facts.get("programs", ())),
    )
    if plan is None:
        return report
    packed = any("bits" in stored for stored in facts["stored"].values())
    return report.with_logits(compare_logits(folder, plan, folder), packed=packed, exact=exact)


def _apart(written: Source, name: str, planned: mx.array) -> float:
    """‖b - b'‖ of a written bias and the planned one."""
    if name not in written.parameters:
        raise CheckError(f"{written.folder}: the edited {name} is not in the written model")
    return norm(written.parameters[name].astype(mx.float32) - planned)


def _difference(
    source: Source, written: Source, edited: set[str], untied: str | None, layout: str
) -> str | None:
    """The first tensor outside `edited` that is not the source's, byte for byte; None without one.

    A head that was untied is to hold what the source has in the table `untied`.
    """
    origin = {
        name: name
        for name in source.parameters
        if (path := name.rpartition(".")[0]) not in edited
        and not (untied is not None and path == "lm_head")
    }
    if untied is not None:
        origin |= {
            f"lm_head.{name.removeprefix(untied + '.')}": name
            for name in source.parameters
            if name.startswith(f"{untied}.")
        }
    present = {n for n in written.parameters if n.rpartition(".")[0] not in edited}
    if present != origin.keys():
        return min(present ^ origin.keys())
    if layout == "same" and not source.same_layout:
        differs = _stored_difference(source, written, edited)
        if differs is not None:
            return differs
        origin = {name: old for name, old in origin.items() if name != old}
    for name, old in origin.items():
        x, y = source.parameters[old], written.parameters[name]
        if (x.dtype, x.shape) != (y.dtype, y.shape):
            return name
        if any(a != b for a, b in zip(source.chunks(old), written.chunks(name), strict=True)):
            return name
    return None


def _stored_difference(source: Source, written: Source, edited: set[str]) -> str | None:
    """As `_difference`, of a source that mlx-lm converts: the stored bytes are compared."""
    of_edits = {
        stored
        for name, origin in source.origins.items()
        if name.rpartition(".")[0] in edited
        for stored in origin.names
    }
    for name, old in source.stored.items():
        new = written.stored.get(name)
        if new is None:
            if name not in of_edits:
                return name
        elif name not in of_edits and (
            (old.dtype, old.shape) != (new.dtype, new.shape)
            or any(a != b for a, b in zip(old.chunks(), new.chunks(), strict=True))
        ):
            return name
    return None
