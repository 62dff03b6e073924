"""Write an edited model of facts as a folder, with its ledger. Knows editors and files.

A packed matrix is rounded so that it gives what was meant on the edited keys: exactly along their
main directions, as near as possible along the others. What survives is read back.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban._arrays import as_numpy
from vauban._backend import one_blas_thread
from vauban.edits.blocks import Stored, float_dtype
from vauban.edits.modules import affine_group, packed_format
from vauban.edits.packed import check_precision
from vauban.errors import InputError
from vauban.export.checkpoint import Draft, untouched_entry, write_folder
from vauban.export.model_match import check_model_matches
from vauban.export.source import open_source
from vauban.export.staging import check_output, staged
from vauban.export.tensor_files import array_entry
from vauban.knowledge import LEDGER_FILE, Editor, KeyStats
from vauban.models import folder_of
from vauban.rounding import Energy, fresh_grid, pack, problem, round_table

# Directions of the edited keys that are met exactly, and what may be lost of the edits on those
# keys before a wider format is taken.
EXACT, LIMIT = 8, 0.05


def export_facts(
    editor: Editor,
    model_path: str | Path,
    output_dir: str | Path,
    precision: str | None = None,
    *,
    force: bool = False,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Write the edited model of `model_path` into a new folder: see `Editor.export`.

    `finish` is called with the complete folder before it gets its name.

    Raises InputError for a folder with other weights than the editor started from, and for a
    precision that does not exist.
    """
    check_precision(precision)
    if precision == "adapter":
        raise InputError("facts are exported as weights, not as an adapter")
    source = open_source(model_path)
    check_output(output_dir, force=force, source=source.folder)
    paths = {edited.path for edited in editor.modules.values()}
    check_model_matches(editor.model, open_source(source.folder), paths)
    for layer, edited in editor.modules.items():
        _check_original(editor, layer, source.modules.get(edited.path), source.folder)
    draft = Draft({n: untouched_entry(source, n) for n in source.parameters}, {}, {})
    for layer, edited in editor.modules.items():
        module = source.modules.get(edited.path)
        if module is None:
            raise InputError(f"{source.folder} has no module {edited.path}; it is another model")
        target = editor.weights.current(layer).astype(np.float32)
        before = editor.weights.original[layer]
        for part in ("weight", "scales", "biases"):
            draft.entries.pop(f"{edited.path}.{part}", None)
        keys = np.concatenate([b.kept[layer] for b in editor.ledger.batches] or [before[:0]])
        arrays, outcome = _stored(module, edited.path, target, before, keys, precision, editor)
        draft.outcomes[edited.path] = outcome
        for name, array in arrays.items():
            full = f"{edited.path}.{name}"
            draft.entries[full] = array_entry(full, array)
            draft.changed.add(full)
    editor.ledger.source = str(model_path)
    with staged(output_dir, force=force, source=source.folder) as folder:
        write_folder(source, draft, folder)
        editor.ledger.save(folder / LEDGER_FILE)
        for layer in editor.modules:
            _stats(editor, layer).save(folder / f"key_stats_{layer}.vauban")
        if finish is not None:
            finish(folder)
    return Path(output_dir).expanduser()


def _check_original(editor: Editor, layer: int, module: nn.Module | None, folder: Path) -> None:
    """InputError where the folder's matrix is not the one that the editor started from."""
    if module is None:
        return
    rows = as_numpy(Stored(module).rows(slice(0, 64)))
    before = editor.weights.original[layer][:64]
    own = folder_of(editor.model)
    limit = 4e-3 if own is not None and own.resolve() == folder.resolve() else 0.5
    size = max(float(np.linalg.norm(rows)), 1e-30)
    if before.shape != rows.shape or float(np.linalg.norm(before - rows)) > limit * size:
        raise InputError(
            f"{folder} stores another {editor.modules[layer].path} than the editor started from: "
            "a change that was made in memory would be lost; fuse an adapter into a folder first "
            "(python -m mlx_lm.fuse), or give the folder that the model was loaded from"
        )


def _stats(editor: Editor, layer: int) -> KeyStats:
    assert editor.stats is not None
    return editor.stats[layer]


def _stored(
    module: nn.Module, path: str, target: np.ndarray, before: np.ndarray, keys: np.ndarray,
    precision: str | None, editor: Editor,
) -> tuple[dict[str, mx.array], dict[str, Any]]:  # fmt: skip
    """The arrays of an edited matrix and how it is stored, the narrowest that keeps the edits."""
    packed = "scales" in module
    widths: list[int | None] = [None] if packed and precision in (None, "same") else []
    if ((packed and precision != "float") or precision == "8bit") and affine_group(module):
        widths.append(8)
    for bits in widths:
        if not len(keys):
            break
        arrays, outcome = pack_for_keys(module, path, target, keys, bits)
        if key_loss(outcome.pop("read"), target, before, keys) <= LIMIT:
            return arrays, outcome
    weight = mx.array(target).astype(float_dtype(module))
    return {"weight": weight}, {"mode": "float", "was_packed": packed}


def key_loss(read: np.ndarray, target: np.ndarray, before: np.ndarray, keys: np.ndarray) -> float:
    """‖(Ŵ - T) Kᵀ‖/‖(T - W) Kᵀ‖: what storing loses of the edits, on their keys."""
    wanted = float(np.linalg.norm((target - before) @ keys.T))
    return float(np.linalg.norm((read - target) @ keys.T)) / max(wanted, 1e-30)


@one_blas_thread()
def pack_for_keys(
    module: nn.Module, path: str, target: np.ndarray, keys: np.ndarray, bits: int | None = None
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """`target` packed in the module's own format, or affine with other `bits`, for these keys.

    Codes are moved by coordinate descent so that errors cancel on the keys, and single codes close
    what is missing along the keys' main directions. The result's "read" is Ŵ.
    """
    form = packed_format(module, path, bits)
    if form.own:
        scales, offsets = module.scales, module.get("biases")
    else:
        fresh = fresh_grid(target, form.bits, form.group)
        kind = float_dtype(module)
        scales, offsets = (mx.array(a).astype(kind) for a in fresh)
    basis = np.linalg.svd(keys, full_matrices=False)[2][:EXACT].astype(np.float32)
    size = np.linalg.norm(keys, axis=1, keepdims=True)
    factor = (keys / np.where(size > 0, size, 1.0)).astype(np.float32)
    # Every other input counts as much as white noise of a hundredth of the keys' energy would.
    rest = np.full(keys.shape[1], 0.01 * len(keys) / keys.shape[1], np.float32)
    asked = problem(
        target, basis, as_numpy(scales), None if offsets is None else as_numpy(offsets),
        group_size=form.group, bits=form.bits, mode=form.mode, axis="input",
        aim=basis.astype(np.float64) @ target.astype(np.float64).T, name=path,
    )  # fmt: skip
    codes = round_table(asked, Energy(factor, rest, len(keys)))
    codes = codes if asked.grid.uniform else asked.grid.codes[codes]
    arrays = {"weight": mx.array(pack(codes, form.bits)), "scales": scales}
    if offsets is not None:
        arrays["biases"] = offsets
    read = as_numpy(form.read(arrays))
    outcome = {"bits": form.bits, "group_size": form.group, "mode": form.mode, "read": read}
    return arrays, outcome
