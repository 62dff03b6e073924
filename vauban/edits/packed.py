"""Store an edited matrix in a packed format again, exactly along its direction.

Cuts the matrix, chooses a grid for every group, rounds (`vauban.rounding`), reads back what came of
it, and takes a wider format where too much is left. Experts are taken one by one, tables in blocks
of rows: memory stays near one float32 matrix. Knows modules, no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban._arrays import as_numpy
from vauban._backend import one_blas_thread
from vauban.edits.blocks import Stored, edited_blocks, matrices, row_blocks
from vauban.edits.modules import PackedFormat, affine_group, packed_format
from vauban.edits.update import Update
from vauban.errors import InputError
from vauban.rounding import (
    Axis,
    Energy,
    Problem,
    fresh_grid,
    fresh_is_better,
    orthonormal,
    pack,
    problem,
    round_matrix,
    round_table,
    shifted_target,
)

PRECISIONS = (None, "same", "8bit", "float", "adapter")
# How far from planned the rest of a direction may be, read back in float32, before a wider format
# is used.
LIMIT = 1e-3
# The error of calibrated rounding as a multiple of naive requantization's, at most. Below 4 bits
# that gives most of the cut back, and is no measure.
MOST, _BOUNDED_BITS = 1.34, 4


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
        """Format and figures, without the arrays."""
        arrays = ("parts", "stacked")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in arrays}


def check_precision(precision: str | None) -> None:
    """InputError for a storage format that does not exist."""
    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}; expected None or one of {PRECISIONS[1:]}")


def store_packed(
    module: nn.Module,
    update: Update,
    precision: str | None,
    energies: Sequence[Energy | None] = (),
) -> Packed | None:
    """The edited matrix packed, or None where it is to be stored as floats.

    A packed module keeps its format (None, "same") as long as what is left of the direction in it
    is within `LIMIT` of what was planned; then 8 bits, then the float type are taken, by name in
    the report. A module whose width no group divides goes from its own format to floats.
    """
    check_precision(precision)
    packed = "scales" in module
    widths: list[int | None] = [None] if packed and precision in (None, "same") else []
    if (packed and precision != "float") or precision == "8bit":
        # A width that no group divides cannot be packed anew.
        widths += [8] if affine_group(module) else []
    for bits in widths:
        stored = pack_edited(module, update, energies, bits=bits)
        if stored.missed <= LIMIT:
            return stored
    return None


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
    a width that no affine group divides, and weights that are NaN or inf.
    """
    form = packed_format(module, update.path, bits)
    parts: dict[str, list[mx.array]] = {}
    total = dict.fromkeys(_NORMS, 0.0)
    for stored in matrices(module):
        energy = energies[stored.expert or 0] if energies else None
        blocks: dict[str, list[mx.array]] = {}
        for rows, target, removed, had in _cut(stored, update.of_expert(stored.expert)):
            arrays = _round(stored, rows, target, removed, update, form, energy)
            norms = _read_back(arrays, target, removed, update, form) | {"had": had}
            total = {name: total[name] + value for name, value in norms.items()}
            for name, array in arrays.items():
                blocks.setdefault(name, []).append(array)
        for name, pieces in blocks.items():
            parts.setdefault(name, []).append(mx.concatenate(pieces))
            mx.eval(parts[name][-1])
    size = max(total["had"], 1e-30)
    return Packed(
        parts,
        module.weight.ndim == 3,
        form.bits,
        form.group,
        form.mode,
        left=(total["left"] / size) ** 0.5,
        missed=(total["missed"] / size) ** 0.5,
        error=(total["error"] / max(total["target"], 1e-30)) ** 0.5,
        leak=total["leak"] ** 0.5 / max(total["removed"], 1e-30),
        had=total["had"] ** 0.5,
    )


_NORMS = ("left", "missed", "error", "target", "leak", "removed", "had")


def _cut(stored: Stored, update: Update) -> Iterator[tuple[slice, np.ndarray, np.ndarray, float]]:
    """(rows, T, R, ‖U W‖²): a table block by block, a matrix on the whole.

    R = U W (k, in) are the rows that the cut takes out, of a table U Wᵀ (k, rows).
    """
    shape, by_rows = stored.shape, update.writes_rows
    target = np.empty((0 if by_rows else shape[0], shape[1]), np.float32)
    removed = mx.zeros((len(update.basis), shape[1]))
    for rows, before, after in edited_blocks(stored, update):
        if by_rows:
            had = update.basis @ before.T
            yield rows, np.array(after), np.array(had), _square(had)
            continue
        removed = removed + update.basis[:, rows] @ before
        mx.eval(removed)
        target[rows] = np.array(after)
    if not by_rows:
        taken = removed if update.protection is None else update.protection.taken(removed)
        yield slice(0, shape[0]), target, np.array(taken), _square(removed)


def _round(
    stored: Stored, rows: slice, target: np.ndarray, removed: np.ndarray, update: Update,
    form: PackedFormat, energy: Energy | None,
) -> dict[str, mx.array]:  # fmt: skip
    """weight, scales and biases of some rows.

    A group keeps its stored grid unless a fresh one rounds better what is wanted; the scales of the
    float modes are relative and always kept.
    """

    def ask(scales: mx.array, offsets: mx.array | None) -> Problem:
        return problem(
            target, basis, as_numpy(scales), None if offsets is None else as_numpy(offsets),
            group_size=form.group, bits=form.bits, mode=form.mode,
            axis="input" if update.writes_rows else "output", aim=aim, name=update.path,
        )  # fmt: skip

    basis = _exact_basis(update)
    # What is to stay along U on purpose is to be there after rounding as well.
    aim = None if update.whole else basis @ (target.T if update.writes_rows else target)
    grid = kept = stored.grid(rows) if form.own else None
    if kept is None or kept[1] is not None:
        wanted = target
        if kept is not None and not update.writes_rows:
            wanted = shifted_target(ask(*kept))
        fresh = fresh_grid(wanted, form.bits, form.group)
        scales, offsets = (mx.array(a).astype(stored.scale_dtype) for a in fresh)
        grid = scales, offsets
        if kept is not None and kept[1] is not None:
            old, new = (as_numpy(kept[0]), as_numpy(kept[1])), (as_numpy(scales), as_numpy(offsets))
            better = mx.array(fresh_is_better(wanted, old, new, form.bits))
            grid = mx.where(better, scales, kept[0]), mx.where(better, offsets, kept[1])
    assert grid is not None
    asked = ask(*grid)
    if update.writes_rows:
        codes = round_table(asked, energy)
    else:
        most = np.inf if energy is None or form.bits < _BOUNDED_BITS else _most(target, form)
        codes = round_matrix(asked, removed, energy, most)
    # An affine grid's codes are its indices.
    codes = codes if asked.grid.uniform else asked.grid.codes[codes]
    arrays = {"weight": mx.array(pack(codes, form.bits)), "scales": grid[0]}
    return arrays if grid[1] is None else {**arrays, "biases": grid[1]}


def _most(target: np.ndarray, form: PackedFormat) -> float:
    """What ‖Ŵ - T‖² may be: `MOST` times as much as MLX's own quantization of T has."""
    total = 0.0
    for rows in row_blocks(target.shape):
        part = mx.array(target[rows])
        stored = mx.quantize(part, form.group, form.bits, mode=form.mode)
        names = ("weight", "scales", "biases")
        total += _square(form.read(dict(zip(names, stored, strict=False))) - part)
    return MOST**2 * total


def _read_back(
    arrays: dict[str, mx.array], target: np.ndarray, removed: np.ndarray, update: Update,
    form: PackedFormat,
) -> dict[str, float]:  # fmt: skip
    """Squared norms of what is stored, in float32: see `Packed`."""
    by_rows, norms = update.writes_rows, dict.fromkeys(_NORMS, 0.0)
    basis, exact = as_numpy(update.basis), _exact_basis(update)
    left, missed = (np.zeros((len(u), target.shape[1]), np.float32) for u in (basis, exact))
    for rows in row_blocks(target.shape):
        read = np.array(form.read({name: array[rows] for name, array in arrays.items()}))
        off = read - target[rows]
        norms["error"] += _square(off)
        norms["target"] += _square(target[rows])
        if by_rows:
            norms["left"] += _square(read @ basis.T)
            norms["missed"] += _square(off @ exact.T)
            continue
        left += basis[:, rows] @ read
        missed += exact[:, rows] @ off
        # The inputs of a table are single rows: there is no leak to speak of.
        norms["leak"] += _square(off @ removed.T)
    norms["removed"] = 0.0 if by_rows else _square(removed)
    norms["left"] += _square(left)
    norms["missed"] += _square(missed)
    return norms


def _exact_basis(update: Update) -> np.ndarray:
    """(j, out): the directions to be met exactly. A sparse cut moves codes in its own rows only."""
    basis = as_numpy(update.basis)
    if update.rows is None:
        return basis
    kept = orthonormal(basis * np.array(update.rows).T)
    return kept.astype(np.float32) if len(kept) else basis


def _square(a: mx.array | np.ndarray) -> float:
    """‖a‖², in NumPy: on a CPU mlx sums a whole array far slower than BLAS does."""
    flat = np.ascontiguousarray(a).reshape(-1)
    return float(flat @ flat)


@one_blas_thread()
def quantize_direction_exact(
    target: mx.array,
    directions: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str = "affine",
    removed: mx.array | None = None,
    axis: Axis = "output",
) -> mx.array:
    """Packed weight (uint32) of `target` on the given grid with (almost) nothing of U in it.

    target (out, in) or (E, out, in) float: the cut matrix. directions (k, out) row-orthonormal.
    scales, biases (..., out, in/group_size) as stored; biases None for mxfp4, mxfp8 and nvfp4.
    removed (k, in) = U W, the rows the cut took out: with it inputs along them see no substitute
    either. axis "input" takes directions (k, in) and empties every ROW, for embeddings.

    Raises InputError for shapes that do not fit, and for NaN and inf.

    >>> import mlx.core as mx
    >>> w = mx.random.normal((256, 128), key=mx.random.key(0))
    >>> u = mx.full((1, 256), 1 / 16)
    >>> q, s, b = mx.quantize(w, group_size=64, bits=4)
    >>> w = mx.dequantize(q, s, b, group_size=64, bits=4)
    >>> packed = quantize_direction_exact(w - u.T @ (u @ w), u, s, b, group_size=64, bits=4)
    >>> left = u @ mx.dequantize(packed, s, b, group_size=64, bits=4)
    >>> (mx.linalg.norm(left) / mx.linalg.norm(u @ w)).item() < 1e-3
    True
    """
    if target.ndim == 3:
        if scales.ndim != 3 or len(scales) != len(target):
            raise InputError(f"scales {scales.shape} do not fit target {target.shape}")
        experts = [
            quantize_direction_exact(
                target[e], directions, scales[e], None if biases is None else biases[e],
                group_size=group_size, bits=bits, mode=mode, axis=axis,
                removed=removed[e] if removed is not None and removed.ndim == 3 else removed,
            )
            for e in range(len(target))
        ]  # fmt: skip
        return mx.stack(experts)
    asked = problem(
        as_numpy(target), as_numpy(directions), as_numpy(scales),
        None if biases is None else as_numpy(biases), group_size=group_size, bits=bits, mode=mode,
        axis=axis,
    )  # fmt: skip
    if axis == "input":
        codes = round_table(asked)
    else:
        codes = round_matrix(asked, None if removed is None else np.atleast_2d(as_numpy(removed)))
    return mx.array(pack(asked.grid.codes[codes], bits))
