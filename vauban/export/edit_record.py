"""`edit.vauban`: what an export was planned to hold, so that it can be judged from its file.

Knows plans and checkpoints; writes no weights and judges nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from vauban._arrays import load_arrays, save_arrays
from vauban.edits.plan import EditPlan
from vauban.errors import InputError
from vauban.export.checkpoint import Draft
from vauban.export.layout import Placement
from vauban.export.programs import programs_of
from vauban.export.read_back import norm, planned_rows
from vauban.export.source import Source, open_source
from vauban.export.tensor_files import stored_tensors

EDIT_FILE = "edit.vauban"
# Its name in folders of earlier versions.
EARLIER_EDIT_FILE = "edit.safetensors"
_FORMAT = "vauban.edit/2"


def write_edit_record(
    plan: EditPlan,
    source: Source,
    draft: Draft,
    precision: str,
    folder: Path,
    placement: Placement,
    notes: Sequence[str],
) -> None:
    """Each writer's basis, how much of it there was, what is to be left, the settings.

    `planned.PATH` is U W', where that is not 0, and `bias.PATH` the edited bias.
    """
    arrays = {"basis": plan.basis, **{f"basis.{u.path}": u.basis for u in plan.updates}}
    arrays |= {f"offset.{u.path}": u.offset for u in plan.updates if u.offset is not None}
    before = {path: facts["had"] for path, facts in draft.outcomes.items()}
    # The modules of `source` have let go of their arrays by now.
    fresh = open_source(source.folder)
    for update in plan.updates:
        module = fresh.modules[update.path]
        rows = planned_rows(module, update)
        if rows is not None:
            arrays[f"planned.{update.path}"] = rows
        if update.bias and "bias" in module:
            bias = update.new_bias(module.bias)
            arrays[f"bias.{update.path}"] = bias
            before[f"{update.path}.bias"] = norm(module.bias.astype(mx.float32) - bias)
        mx.eval(arrays)
        fresh.release(update.path)
    facts = {
        **plan.to_dict(),
        "before": before,
        "precision": precision,
        "layout": placement.layout,
        "programs": programs_of(source, stored_tensors(folder), placement.layout),
        "notes_on_files": list(notes),
        "stored": draft.outcomes,
    }
    metadata = {"format": _FORMAT, "plan": json.dumps(facts, sort_keys=True)}
    save_arrays(folder / EDIT_FILE, arrays, metadata)


def read_edit_record(folder: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The arrays and the facts of an exported folder; InputError where it holds no such record."""
    places = (folder / EDIT_FILE, folder / EARLIER_EDIT_FILE)
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise InputError(
            f"{folder} has no {EDIT_FILE}, which says what was planned; only a plan's export has "
            "one (plan_cut(...).export, vauban cut). What export_model wrote holds the weights it "
            "was given: load it and measure that"
        )
    arrays, metadata = load_arrays(file)
    if metadata.get("format") != _FORMAT:
        raise InputError(
            f"{file} has the format {metadata.get('format')!r}; expected {_FORMAT!r}: export again "
            "with this version"
        )
    return arrays, json.loads(metadata["plan"])
