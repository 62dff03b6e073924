"""Store an edited matrix in a packed format again, exactly along its direction.

Chooses the grid of every group (the stored one, or a fresh one where that rounds clearly better),
rounds direction-exactly, reads back what came of it, and says so. Knows modules, no model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from vauban.edits.exact import quantize_direction_exact, round_plainly
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
    leak    ‖(Ŵ - T) w‖/‖U W‖ for unit inputs w along what was removed: what it was replaced with
    """

    arrays: dict[str, mx.array]
    bits: int
    group_size: int
    mode: str
    left: float
    error: float
    leak: float

    def to_dict(self) -> dict[str, Any]:
        facts = asdict(self)
        facts.pop("arrays")
        return facts


def pack_edited(
    module: nn.Module,
    update: Update,
    *,
    bits: int | None = None,
    rounding: Rounding = "two-sided",
) -> Packed:
    """The edited matrix of a packed `module` in its own format, or affine with other `bits`.

    Raises InputError for a format MLX does not pack, or an unpacked module without `bits`.
    """
    packed = "scales" in module
    if not packed and bits is None:
        raise InputError(f"{update.path} is not packed; name the bits to pack it with")
    group, mode = (
        (module.group_size, getattr(module, "mode", "affine")) if packed else (64, "affine")
    )
    own = packed and bits in (None, module.bits)
    chosen = module.bits if own else int(bits or 8)
    if not own:
        group, mode = (group if mode == "affine" else 64), "affine"
    before = _float32(module)
    target = update.weight(before)
    fresh = mx.quantize(target.astype(_scale_dtype(module)), group, chosen, mode=mode)
    scales: mx.array = fresh[1]
    biases: mx.array | None = fresh[2] if len(fresh) > 2 else None
    if own:
        scales, biases = _better_grid(module, target, scales, biases, group, chosen)
    removed = update.removed(before)
    if update.complete:
        weight = quantize_direction_exact(
            target,
            update.basis,
            scales,
            biases,
            group_size=group,
            bits=chosen,
            mode=mode,
            removed=removed if rounding == "two-sided" and not update.writes_rows else None,
            axis="input" if update.writes_rows else "output",
        )
    else:
        # A sparse or protected cut leaves part of the direction on purpose: round plainly.
        weight = round_plainly(target, scales, biases, group_size=group, bits=chosen, mode=mode)
    arrays = {"weight": weight, "scales": scales}
    if biases is not None:
        arrays["biases"] = biases
    after = unpack(weight, scales, biases, group, chosen, mode)
    had = mx.linalg.norm(removed)
    difference = after - target
    inputs = difference.T if update.writes_rows else difference
    leak = mx.linalg.norm(inputs @ mx.swapaxes(removed, -1, -2)) / mx.maximum(had * had, 1e-30)
    return Packed(
        arrays,
        chosen,
        group,
        mode,
        left=update.share_left(after, before),
        error=float(mx.linalg.norm(difference) / mx.maximum(mx.linalg.norm(target), 1e-30)),
        leak=float(leak),
    )


def _float32(module: nn.Module) -> mx.array:
    if "scales" not in module:
        return module.weight.astype(mx.float32)
    return unpack(
        module.weight, module.scales, module.get("biases"), module.group_size, module.bits,
        getattr(module, "mode", "affine"),
    )  # fmt: skip


def _scale_dtype(module: nn.Module) -> mx.Dtype:
    """The float type that new scales are stored in: that of the old ones."""
    if "scales" in module and module.scales.dtype != mx.uint8:
        return module.scales.dtype
    return mx.bfloat16 if "scales" in module else module.weight.dtype


def _better_grid(
    module: nn.Module,
    target: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    group: int,
    bits: int,
) -> tuple[mx.array, mx.array | None]:
    """The stored grid of each group, or the fresh one where it rounds the target clearly better.

    A cut can shrink a row's range so much that its stored grid is far too wide. The float modes
    have relative grids and keep theirs.
    """

    def error(s: mx.array, b: mx.array) -> mx.array:
        grouped = target.reshape(*s.shape, group)
        step = s.astype(mx.float32)[..., None]
        safe = mx.where(step == 0, 1.0, step)
        offset = b.astype(mx.float32)[..., None]
        code = mx.clip(mx.round((grouped - offset) / safe), 0, 2**bits - 1)
        return ((grouped - (code * step + offset)) ** 2).sum(axis=-1)

    if biases is None:
        return module.scales, None
    stored = module.scales, module.biases
    new = error(scales, biases) < _CLEARLY * error(*stored)
    return mx.where(new, scales, stored[0]), mx.where(new, biases, stored[1])
