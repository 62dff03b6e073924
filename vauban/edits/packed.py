"""Store an edited matrix in a packed format again, exactly along its direction.

Chooses the grid of every group (the stored one, or a fresh one where that rounds clearly better),
rounds direction-exactly, reads back what came of it, and says so. Matrices are unpacked in blocks
and experts one by one, so that memory stays near one float32 matrix. Knows modules, no model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban.edits.blocks import Stored, blocks, matrices
from vauban.edits.exact import round_matrix, round_plainly
from vauban.edits.modules import unpack
from vauban.edits.update import Update
from vauban.errors import InputError

# A fresh grid is taken where it has less than half the squared error of the stored one.
_CLEARLY = 0.5
# What may be left of a direction, as read back in float32, before a wider format is used.
LIMIT = 1e-3
Rounding = Literal["two-sided", "fast"]


@dataclass(frozen=True, eq=False)
class Packed:
    """Arrays to store, their format, and what the rounding did, read back in float32.

    left    ‖U Ŵ‖/‖U W‖, the share of the direction in the stored matrix
    error   ‖Ŵ - T‖/‖T‖ against the exactly cut matrix T
    had     ‖U W‖ before the cut
    leak    ‖(Ŵ - T) w‖/‖U W‖ for unit inputs w along what was removed: what it was replaced with
    """

    arrays: dict[str, mx.array]
    bits: int
    group_size: int
    mode: str
    left: float
    error: float
    leak: float
    had: float

    def to_dict(self) -> dict[str, Any]:
        facts = asdict(self)
        facts.pop("arrays")
        return facts


@dataclass(frozen=True)
class _Format:
    bits: int
    group: int
    mode: str


@dataclass
class _Sums:
    """Squared norms over all blocks and experts."""

    left: float = 0.0
    had: float = 0.0
    error: float = 0.0
    target: float = 0.0
    leak: float = 0.0
    leak_had: float = 0.0

    def add(self, update: Update, read: mx.array, wanted: np.ndarray) -> np.ndarray:
        """Take in a part as it was stored and as it should be; returns the difference.

        In NumPy: on a CPU mlx sums a whole array to one number far slower than BLAS does, and
        takes in a slice of a larger array element by element.
        """
        difference = np.array(read)
        difference -= wanted
        target = np.ascontiguousarray(wanted)
        self.left += float((update.removed(read) ** 2).sum())
        self.error += float(np.vdot(difference, difference))
        self.target += float(np.vdot(target, target))
        return difference


def pack_edited(
    module: nn.Module,
    update: Update,
    *,
    bits: int | None = None,
    rounding: Rounding = "two-sided",
) -> Packed:
    """The edited matrix of a packed `module` in its own format, or affine with other `bits`.

    Raises InputError for an unpacked module without `bits`.
    """
    packed = "scales" in module
    if not packed and bits is None:
        raise InputError(f"{update.path} is not packed; name the bits to pack it with")
    own = packed and bits in (None, module.bits)
    mode = getattr(module, "mode", "affine") if own else "affine"
    affine = packed and getattr(module, "mode", "affine") == "affine"
    form = _Format(
        module.bits if own else int(bits or 8), module.group_size if own or affine else 64, mode
    )
    sums = _Sums()
    if module.weight.ndim == 3:
        parts = [
            _matrix(stored, _one(update, e), form, own, rounding, sums)
            for e, stored in enumerate(matrices(module))
        ]
        arrays = {name: mx.stack([p[name] for p in parts]) for name in parts[0]}
    elif update.writes_rows and update.acts_on_outputs:
        arrays = _table(Stored(module), update, form, own, sums)
    else:
        arrays = _matrix(Stored(module), update, form, own, rounding, sums)
    mx.eval(arrays)
    return Packed(
        arrays,
        form.bits,
        form.group,
        form.mode,
        left=float(np.sqrt(sums.left / max(sums.had, 1e-30))),
        error=float(np.sqrt(sums.error / max(sums.target, 1e-30))),
        leak=float(np.sqrt(sums.leak) / max(sums.leak_had, 1e-30)),
        had=float(np.sqrt(sums.had)),
    )


def _table(
    stored: Stored, update: Update, form: _Format, own: bool, sums: _Sums
) -> dict[str, mx.array]:
    """Pack a table whose rows are cut and rounded on their own, block by block."""
    found: dict[str, list[mx.array]] = {"weight": [], "scales": [], "biases": []}
    for rows, columns in blocks(stored.shape, True, 1):
        before = stored.part(rows, columns)
        target = update.weight(before)
        sums.had += float((update.removed(before) ** 2).sum())
        grid = _grid(stored, target, form, own, rows, columns)
        wanted = np.array(target)
        packed = mx.array(_rounded(wanted, update, grid, form, None))
        # Its inputs are single rows, so there is no leak to speak of.
        sums.add(update, _read(packed, *grid, form), wanted)
        for name, value in zip(found, (packed, *grid), strict=True):
            if value is not None:
                found[name].append(value)
    return {name: mx.concatenate(parts, 0) for name, parts in found.items() if parts}


def _matrix(
    stored: Stored, update: Update, form: _Format, own: bool, rounding: Rounding, sums: _Sums
) -> dict[str, mx.array]:
    """Pack a matrix: a plain cut is made by blocks of columns, any other on the whole."""
    shape = stored.shape
    unit = int(np.lcm.reduce([32, form.group, getattr(stored.module, "group_size", 1)]))
    parts = [(slice(0, shape[0]), slice(0, shape[1]))]
    if update.acts_on_outputs:
        parts = list(blocks(shape, False, unit))
    target = np.empty(shape, np.float32)
    grids, removed = [], []
    for rows, columns in parts:
        before = stored.part(rows, columns)
        after = update.weight(before)
        gone = update.removed(before)
        sums.had += float((gone**2).sum())
        grids.append(_grid(stored, after, form, own, rows, columns))
        mx.eval(grids[-1])
        removed.append(np.array(gone))
        target[rows, columns] = np.array(after)
    scales = mx.concatenate([g[0] for g in grids], 1)
    biases = [g[1] for g in grids if g[1] is not None]
    grid = (scales, mx.concatenate(biases, 1) if biases else None)
    gone_rows = np.concatenate(removed, axis=1)
    two_sided = rounding == "two-sided" and not update.writes_rows
    packed = mx.array(_rounded(target, update, grid, form, gone_rows if two_sided else None))
    along = None if update.writes_rows else gone_rows
    leak = np.zeros((shape[0], len(gone_rows)))
    for rows, columns in parts:
        groups = slice(columns.start // form.group, columns.stop // form.group)
        words = slice(columns.start * form.bits // 32, columns.stop * form.bits // 32)
        offsets = None if grid[1] is None else grid[1][rows, groups]
        read = _read(packed[rows, words], scales[rows, groups], offsets, form)
        difference = sums.add(update, read, target[rows, columns])
        if along is not None:
            leak[rows] += difference @ along[:, columns].T
    if along is not None:
        sums.leak += float((leak**2).sum())
        sums.leak_had += float((along * along).sum())
    found = {"weight": packed, "scales": scales}
    if grid[1] is not None:
        found["biases"] = grid[1]
    return found


def _one(update: Update, expert: int) -> Update:
    """The update of one expert's matrix: its own protection."""
    p = update.protection
    if p is None:
        return update
    own = replace(p, spaces=(p.spaces[expert],), targets=(p.targets[expert],) if p.targets else ())
    return replace(update, protection=own)


def _rounded(
    target: np.ndarray,
    update: Update,
    grid: tuple[mx.array, mx.array | None],
    form: _Format,
    removed: np.ndarray | None,
) -> np.ndarray:
    if update.complete:
        return round_matrix(
            target, update.basis, *grid, group_size=form.group, bits=form.bits, mode=form.mode,
            removed=removed, axis="input" if update.writes_rows else "output",
        )  # fmt: skip
    # A sparse or protected cut leaves part of the direction on purpose: round plainly.
    plain = round_plainly(
        mx.array(target), *grid, group_size=form.group, bits=form.bits, mode=form.mode
    )
    return np.array(plain)


def _read(weight: mx.array, scales: mx.array, biases: mx.array | None, form: _Format) -> mx.array:
    return unpack(weight, scales, biases, form.group, form.bits, form.mode)


def _grid(
    stored: Stored, target: mx.array, form: _Format, own: bool, rows: slice, columns: slice
) -> tuple[mx.array, mx.array | None]:
    """The stored grid of each group, or the fresh one where it rounds the target clearly better.

    A cut can shrink a row's range so much that its stored grid is far too wide. The float modes
    have relative grids and keep theirs.
    """
    groups = slice(columns.start // form.group, columns.stop // form.group)
    if own and form.mode != "affine":
        return stored.grid(rows, groups)
    fresh = mx.quantize(target.astype(stored.scale_dtype), form.group, form.bits, mode=form.mode)
    scales: mx.array = fresh[1]
    biases: mx.array = fresh[2]
    if not own:
        return scales, biases
    kept_scales, kept_biases = stored.grid(rows, groups)
    assert kept_biases is not None

    def error(s: mx.array, b: mx.array) -> mx.array:
        grouped = target.reshape(*s.shape, form.group)
        step = s.astype(mx.float32)[..., None]
        safe = mx.where(step == 0, 1.0, step)
        offset = b.astype(mx.float32)[..., None]
        code = mx.clip(mx.round((grouped - offset) / safe), 0, 2**form.bits - 1)
        return ((grouped - (code * step + offset)) ** 2).sum(axis=-1)

    new = error(scales, biases) < _CLEARLY * error(kept_scales, kept_biases)
    return mx.where(new, scales, kept_scales), mx.where(new, biases, kept_biases)
