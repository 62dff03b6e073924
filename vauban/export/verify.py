"""Read back what was written: how much of the direction is left, and that nothing else changed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from vauban._arrays import load_arrays
from vauban.edits import EditPlan
from vauban.edits.blocks import direction_norm
from vauban.edits.update import is_table
from vauban.errors import CheckError, InputError
from vauban.export.adapter import is_adapter
from vauban.export.checkpoint import EDIT_FILE, Source, open_source
from vauban.export.tensors import sha256
from vauban.models import anatomy, forward, load, residual_writers

# bfloat16 storage alone leaves 2 to 5e-3 of a direction; float16 and float32 far less.
_LIMIT = 0.02


@dataclass(frozen=True)
class ExportReport:
    """What stands in an exported folder.

    direction_left      largest ‖U W'‖/‖U W‖ over the edited modules, read from the file
    stored              per edited module its format and, where packed, what the rounding did
    logits_difference   from the run-time cut, as a share of what the cut changes; None unmeasured
    expected_left       what the plan leaves at most; None where it leaves part on purpose
    modules_edited      residual writers the plan edited; `modules_present` all there are
    untouched_identical whether every other tensor has the source's bytes; None without a source
    """

    folder: str
    direction_left: float
    modules_edited: int
    modules_present: int
    untouched_identical: bool | None
    writers: dict[str, float]
    expected_left: float | None
    precision: str
    stored: dict[str, dict[str, Any]]
    files: dict[str, str]
    bytes: int
    logits_difference: float | None = None

    @property
    def ok(self) -> bool:
        """The file holds what was planned."""
        whole = self.expected_left is None or self.direction_left <= self.expected_left + _LIMIT
        return whole and self.untouched_identical is not False

    def check(self) -> ExportReport:
        """Self, or CheckError saying what is not as it should be."""
        if self.untouched_identical is False:
            raise CheckError(
                f"{self.folder}: tensors that should not change differ from the source"
            )
        if self.expected_left is not None and not self.ok:
            worst = max(self.writers, key=lambda p: self.writers[p])
            raise CheckError(
                f"{self.folder}: {self.direction_left:.1%} of the direction is left in {worst}; "
                f"expected at most {self.expected_left + _LIMIT:.1%}"
            )
        return self

    def summary(self) -> str:
        same = {True: "untouched tensors identical", False: "UNTOUCHED TENSORS DIFFER", None: ""}
        parts = [
            f"direction left {self.direction_left:.2e}",
            f"{self.modules_edited} of {self.modules_present} writers edited",
            self._storage(),
            same[self.untouched_identical],
            f"{self.bytes / 1e6:.1f} MB" if self.bytes >= 1e5 else f"{self.bytes / 1e3:.1f} kB",
        ]
        return "; ".join(p for p in parts if p)

    def _storage(self) -> str:
        """How the edited modules are stored, as a count per format."""
        counts: dict[str, int] = {}
        for facts in self.stored.values():
            name = f"{facts['bits']}-bit {facts['mode']}" if "bits" in facts else facts["mode"]
            counts[name] = counts.get(name, 0) + 1
        return "stored as " + ", ".join(f"{n} {name}" for name, n in counts.items())

    def to_dict(self) -> dict[str, Any]:
        return {
            "direction_left": self.direction_left,
            "expected_left": self.expected_left,
            "modules_edited": self.modules_edited,
            "modules_present": self.modules_present,
            "untouched_identical": self.untouched_identical,
            "precision": self.precision,
            "writers": dict(self.writers),
            "stored": {path: dict(facts) for path, facts in self.stored.items()},
            "files": dict(self.files),
            "logits_difference": self.logits_difference,
            "bytes": self.bytes,
        }


def verify_export(
    output_dir: str | Path,
    *,
    source: str | Path | None = None,
    plan: EditPlan | None = None,
) -> ExportReport:
    """Reopen an exported folder and report what is left of the direction, per writer.

    Reads `edit.safetensors`, which every planned export carries. With `source` the tensors that
    were not edited are compared byte by byte. With `plan` the folder is loaded as a model and its
    logits on a probe compared with the run-time cut of the plan's model. Raises InputError when
    the folder is no export.
    """
    folder = Path(output_dir)
    if is_adapter(folder):
        raise InputError(
            f"{folder} is an adapter, which holds no weights to read; load its model with it "
            "(vauban.load(source, adapter_path=...)) and evaluate that"
        )
    record = folder / EDIT_FILE
    if not record.is_file():
        raise InputError(f"{folder} has no {EDIT_FILE}; it was not written by an EditPlan")
    arrays, metadata = load_arrays(record)
    facts = json.loads(metadata["plan"])
    written = open_source(folder)
    present = residual_writers(written.model)
    modules = dict(written.model.named_modules())
    left, expected, whole = {}, 0.0, True
    for entry in facts["writers"]:
        path = entry["path"]
        if path not in modules:
            raise CheckError(f"{folder}: the edited module {path} is not in the written model")
        had = facts["before"][path]
        norm = direction_norm(
            modules[path],
            arrays[f"basis.{path}"],
            is_table(entry["layer"], entry["kind"]),
            arrays.get(f"offset.{path}"),
        )
        written.release(path)
        left[path] = norm / had if had > 0 else 0.0
        whole = whole and entry["complete"]
        expected = max(expected, abs(1.0 - entry["alpha"]))
    edited = set(left)
    files = {f.name: sha256(f) for f in sorted(folder.glob("model*.safetensors"))}
    head = {"lm_head"} if facts["embedding"] == "untie" else set()
    return ExportReport(
        folder=str(folder),
        direction_left=max(left.values(), default=0.0),
        modules_edited=len(edited),
        modules_present=len(present),
        untouched_identical=(
            None if source is None else _identical(open_source(source), written, edited | head)
        ),
        writers=left,
        expected_left=expected if whole else None,
        precision=facts["precision"],
        stored=facts["stored"],
        files=files,
        bytes=sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
        logits_difference=None if plan is None else logits_difference(folder, plan, folder),
    )


def logits_difference(folder: Path, plan: EditPlan, source: str | Path) -> float:
    """max |exported - run-time cut| / max |uncut - run-time cut| over the logits of a probe.

    An adapter is opened on `source`, the model it was written for.
    """
    exported, _ = load(source, adapter_path=str(folder)) if is_adapter(folder) else load(folder)
    original = plan.model
    top = min(anatomy(original).vocabulary, 50_000)
    tokens = (mx.arange(24)[None] * 7919 + 13) % top

    def logits(model: Any, interventions: Any = ()) -> mx.array:
        found = forward(model, tokens, positions=None, interventions=interventions).logits
        assert found is not None
        return found.astype(mx.float32)

    virtual = logits(original, plan.virtual())
    moved = float(mx.abs(logits(original) - virtual).max())
    return float(mx.abs(logits(exported) - virtual).max()) / max(moved, 1e-30)


def _identical(source: Source, written: Source, edited: set[str]) -> bool:
    """Whether every parameter outside `edited` modules is the source's, byte for byte."""
    outside = [n for n in source.parameters if n.rpartition(".")[0] not in edited]
    if {n for n in written.parameters if n.rpartition(".")[0] not in edited} != set(outside):
        return False
    for name in outside:
        if source.same_layout:
            a, b = source.stored[name], written.stored[name]
            if (a.dtype, a.shape) != (b.dtype, b.shape):
                return False
            if any(x != y for x, y in zip(a.chunks(), b.chunks(), strict=True)):
                return False
        else:
            x, y = source.parameters[name], written.parameters[name]
            if x.dtype != y.dtype or not bool(mx.array_equal(x, y)):
                return False
    return True
