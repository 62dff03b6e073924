"""Store an edited matrix in a packed format again, exactly along its direction.

Chooses the grid of every group, rounds direction-exactly, reads back what came of it, and says so.
Matrices are unpacked in blocks, experts one by one: memory stays near one float32 matrix. Knows
modules, no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban._backend import one_blas_thread
from vauban.edits.blocks import Stored, blocks, matrices
from vauban.edits.damped import damped_codes
from vauban.edits.exact import exact_codes, first_shifts, pack_codes
from vauban.edits.modules import refuse_unknown_packing, unpack
from vauban.edits.moments import Energy
from vauban.edits.problem import Problem, problem
from vauban.edits.refit import fresh_grid, refit
from vauban.edits.two_sided import one_behind, orthonormal
from vauban.edits.update import Update
from vauban.errors import InputError
from vauban.models import unpacked_shape

# How far from planned the rest of a direction may be, read back in float32, before a wider format
# is used.
LIMIT = 1e-3
# Elements that are rounded together where parts are rounded on their own.
_PART = 1 << 22


@dataclass(frozen=True, eq=False)
class Packed:
    """Arrays to store, their format, and what the rounding did, read back in float32.

    parts   by name the array of every expert, of a plain matrix the only one (`stacked` False)
    left    ‖U Ŵ‖/‖U W‖, the share of the direction in the stored matrix
    missed  ‖U (Ŵ - T)‖/‖U W‖, how far that is from what was planned (0 of it, at α 1)
    error   ‖Ŵ - T‖/‖T‖ against the exactly cut matrix T
    had     ‖U W‖ before the cut
    leak    ‖(Ŵ - T) w‖/‖U W‖ for unit inputs w along what was removed: what it was replaced with
    """

    parts: dict[str, list[mx.array]]
    stacked: bool
    bits: int
    group_size: int
    mode: str
    left: float
    missed: float
    error: float
    leak: float
    had: float

    @property
    def arrays(self) -> dict[str, mx.array]:
        """The module's arrays by name, experts stacked."""
        return {n: mx.stack(v) if self.stacked else v[0] for n, v in self.parts.items()}

    def to_dict(self) -> dict[str, Any]:
        """What there is to say of it, without the arrays."""
        held = ("parts", "stacked")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in held}


@dataclass(frozen=True)
class _Format:
    bits: int
    group: int
    mode: str


@dataclass
class _Sums:
    """Squared norms over all blocks and experts.

    basis (k, out) is the update's, exact (j, out) what is to be met exactly; `by_rows` for a table.
    """

    basis: np.ndarray
    exact: np.ndarray
    by_rows: bool
    left: float = 0.0
    missed: float = 0.0
    had: float = 0.0
    error: float = 0.0
    target: float = 0.0
    leak: float = 0.0
    leak_had: float = 0.0

    def add(self, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Take in a part as it was stored and as it should be; returns the difference.

        In NumPy: on a CPU mlx sums a whole array to one number far slower than BLAS does, and
        takes in a slice of a larger array element by element.
        """
        difference = values - wanted
        target = np.ascontiguousarray(wanted)

        def along(basis: np.ndarray, matrix: np.ndarray) -> float:
            found = matrix @ basis.T if self.by_rows else basis @ matrix
            return float(np.vdot(found, found))

        self.left += along(self.basis, values)
        self.missed += along(self.exact, difference)
        self.error += float(np.vdot(difference, difference))
        self.target += float(np.vdot(target, target))
        return difference


@one_blas_thread()
def pack_edited(
    module: nn.Module,
    update: Update,
    energies: Sequence[Energy | None] = (),
    *,
    bits: int | None = None,
) -> Packed:
    """The edited matrix of a packed `module` in its own format, or affine with other `bits`.

    `energies` is what the matrix reads (one, or one per expert; None: never routed to), for a table
    how much each direction of its rows matters; () rounds alike for any input.

    Raises InputError for an unpacked module without `bits`, a packing that would be read wrongly,
    and a width that no affine group divides.
    """
    refuse_unknown_packing(module)
    form, own = _format(module, update.path, bits)
    own_basis = np.array(update.basis.astype(mx.float32))
    sums = _Sums(own_basis, _basis(update), update.writes_rows)
    two_sided = not update.writes_rows

    def one(stored: Stored, update: Update) -> dict[str, mx.array]:
        energy = energies[stored.expert or 0] if energies else None
        if update.acts_on_outputs and not two_sided:
            arrays = _by_parts(stored, update, energy, form, own, sums)
        else:
            arrays = _matrix(stored, update, energy, form, own, two_sided, sums)
        mx.eval(arrays)
        return arrays

    stacked = module.weight.ndim == 3
    found = [one(stored, update.of_expert(stored.expert)) for stored in matrices(module)]
    return Packed(
        {name: [arrays[name] for arrays in found] for name in found[0]},
        stacked,
        form.bits,
        form.group,
        form.mode,
        left=float(np.sqrt(sums.left / max(sums.had, 1e-30))),
        missed=float(np.sqrt(sums.missed / max(sums.had, 1e-30))),
        error=float(np.sqrt(sums.error / max(sums.target, 1e-30))),
        leak=float(np.sqrt(sums.leak) / max(sums.leak_had, 1e-30)),
        had=float(np.sqrt(sums.had)),
    )


def affine_group(module: nn.Module) -> int | None:
    """The group size of a module packed anew: its own, 64, or what divides its width; else None."""
    affine = "scales" in module and getattr(module, "mode", "affine") == "affine"
    own = module.group_size if affine else 64
    width = unpacked_shape(module)[-1]
    return next((group for group in (own, 64, 128, 32) if width % group == 0), None)


def _format(module: nn.Module, path: str, bits: int | None) -> tuple[_Format, bool]:
    """How to store a module, and whether that is its own format."""
    if "scales" in module and bits in (None, module.bits):
        return _Format(module.bits, module.group_size, getattr(module, "mode", "affine")), True
    if bits is None:
        raise InputError(f"{path} is not packed; name the bits to pack it with")
    group = affine_group(module)
    if group is None:
        raise InputError(
            f"{path} has {unpacked_shape(module)[-1]} columns; packing takes a multiple of 32"
        )
    return _Format(bits, group, "affine"), False


def _by_parts(
    stored: Stored, update: Update, energy: Energy | None, form: _Format, own: bool, sums: _Sums
) -> dict[str, mx.array]:
    """Pack what is rounded part by part: a table by rows, a matrix one-sided by columns.

    mlx cuts the next part and reads back the last one while NumPy rounds.
    """
    axis = 0 if update.writes_rows else 1
    parts = list(blocks(stored.shape, update.writes_rows, _unit(stored, form), _PART))
    words: list[mx.array] = []
    grids: list[tuple[mx.array, mx.array | None]] = []
    before: tuple[mx.array, np.ndarray, np.ndarray] | None = None
    ahead = _cut(stored, update, parts[0])
    leak = np.zeros((stored.shape[0], len(update.basis)))

    def meanwhile() -> None:
        nonlocal ahead
        if len(words) + 1 < len(parts):
            ahead = _cut(stored, update, parts[len(words) + 1])

    def compare(read: np.ndarray, target: np.ndarray, removed: np.ndarray) -> None:
        difference = sums.add(read, target)
        # The inputs of a table are single rows: there is no leak to speak of.
        if not update.writes_rows:
            np.add(leak, difference @ removed.T, out=leak)
            sums.leak_had += float(np.vdot(removed, removed))

    with one_behind() as behind:
        for part in parts:
            target, removed = (np.array(a) for a in ahead)
            sums.had += float(np.vdot(removed, removed))
            packed, grid = _round(stored, target, update, energy, form, own, None, part, meanwhile)
            if before is not None:
                behind(compare, np.array(before[0]), *before[1:])
            read = _read(packed, *grid, form)
            mx.async_eval(read)
            before = read, target, removed
            words.append(packed)
            grids.append(grid)
        assert before is not None
        behind(compare, np.array(before[0]), *before[1:])
    sums.leak += float((leak**2).sum())
    scales, offsets = zip(*grids, strict=True)
    found = {"weight": words, "scales": list(scales), "biases": list(offsets)}
    return {n: mx.concatenate(a, axis) for n, a in found.items() if a[0] is not None}


def _cut(stored: Stored, update: Update, part: tuple[slice, slice]) -> tuple[mx.array, mx.array]:
    """(the cut part, what was removed), which mlx sets out to compute."""
    before = stored.part(*part)
    found = update.weight(before), update.removed(before)
    mx.async_eval(*found)
    return found


def _unit(stored: Stored, form: _Format) -> int:
    """Columns that fill whole words and groups, as stored and as they are to be."""
    return int(np.lcm.reduce([32, form.group, getattr(stored.module, "group_size", 1)]))


def _matrix(
    stored: Stored,
    update: Update,
    energy: Energy | None,
    form: _Format,
    own: bool,
    two_sided: bool,
    sums: _Sums,
) -> dict[str, mx.array]:
    """Pack a matrix on the whole; a plain cut is made by blocks of columns."""
    shape = stored.shape
    parts = [(slice(0, shape[0]), slice(0, shape[1]))]
    if update.acts_on_outputs:
        parts = list(blocks(shape, False, _unit(stored, form)))
    target = np.empty(shape, np.float32)
    removed = []

    def keep(part: tuple[slice, slice], values: np.ndarray) -> None:
        target[part] = values

    with one_behind() as behind:
        for part in parts:
            before = stored.part(*part)
            after = update.weight(before)
            had = update.removed(before)
            sums.had += float((had**2).sum())
            removed.append(np.array(update.taken(before) if update.protection else had))
            behind(keep, part, np.array(after))
    along = None if update.writes_rows else np.concatenate(removed, axis=1)
    packed, grid = _round(stored, target, update, energy, form, own, along if two_sided else None)
    leak = np.zeros((shape[0], len(update.basis)))

    def compare(rows: slice, columns: slice, values: np.ndarray) -> None:
        difference = sums.add(values, target[rows, columns])
        if along is not None:
            np.add(leak, difference @ along[:, columns].T, out=leak)

    with one_behind() as behind:
        for rows, columns in parts:
            groups = slice(columns.start // form.group, columns.stop // form.group)
            words = slice(columns.start * form.bits // 32, columns.stop * form.bits // 32)
            scales, offsets = (None if a is None else a[rows, groups] for a in grid)
            assert scales is not None
            read = _read(packed[rows, words], scales, offsets, form)
            behind(compare, rows, columns, np.array(read))
    if along is not None:
        sums.leak += float((leak**2).sum())
        sums.leak_had += float((along * along).sum())
    found = {"weight": packed, "scales": grid[0]}
    if grid[1] is not None:
        found["biases"] = grid[1]
    return found


def _round(
    stored: Stored,
    target: np.ndarray,
    update: Update,
    energy: Energy | None,
    form: _Format,
    own: bool,
    removed: np.ndarray | None,
    part: tuple[slice, slice] = (slice(None), slice(None)),
    meanwhile: Callable[[], None] = lambda: None,
) -> tuple[mx.array, tuple[mx.array, mx.array | None]]:
    """Packed weight and grid of the `target` of a part, two-sided where `removed` is given.

    `meanwhile` sets mlx to work once nothing but NumPy is needed.

    With `energy` errors are weighed by what the matrix reads, or by what the rows of a table
    are used for, as long as that is not too dear (`damped`). Affine groups keep their grid or get a
    better one (`refit`); the float modes have relative grids and keep theirs; a new width gets the
    grid that mlx would choose.
    """

    def ask(scales: mx.array, biases: mx.array | None) -> Problem:
        return problem(
            target, mx.array(basis), scales, biases, group_size=form.group, bits=form.bits,
            mode=form.mode, axis="input" if update.writes_rows else "output", aim=aim,
        )  # fmt: skip

    basis, aim, shifts = _basis(update), None, None
    if not update.whole:
        # What stays along U on purpose is to be there after rounding as well.
        aim = basis @ (target.T if update.writes_rows else target)
    if own:
        scales, biases = stored.grid(*part)
        if biases is not None:
            # The one-sided form ("fast") of a matrix saves itself the first of two passes, and the
            # descent moves few codes far: what stays on its grid costs it nothing.
            if removed is not None or (update.writes_rows and energy is None):
                shifts = first_shifts(ask(scales, biases), removed)
            scales, biases = refit(target, scales, biases, form.bits, form.group, shifts)
    else:
        scales, biases = fresh_grid(target, form.bits, form.group, stored.scale_dtype)
    mx.eval(scales, biases)
    asked = ask(scales, biases)
    meanwhile()
    if energy is not None and (update.writes_rows or removed is not None):
        found = damped_codes(asked, energy, removed)
        if found is None:
            return _round(stored, target, update, None, form, own, removed, part)
        codes = found
    else:
        codes = exact_codes(asked, removed, start=None if update.writes_rows else shifts)
    return mx.array(pack_codes(asked, codes)), (scales, biases)


def _basis(update: Update) -> np.ndarray:
    """(k, out): the directions to be met exactly. A sparse cut moves codes in its own rows only."""
    basis = np.array(update.basis.astype(mx.float32))
    if update.rows is None:
        return basis
    kept = orthonormal(basis * np.array(update.rows).T)
    return basis if kept is None else kept


def _read(weight: mx.array, scales: mx.array, biases: mx.array | None, form: _Format) -> mx.array:
    return unpack(weight, scales, biases, form.group, form.bits, form.mode)
