"""In which format an edited module is stored: its own, 8 bits, or floats. Knows mlx modules."""

from __future__ import annotations

import mlx.nn as nn

from vauban.edits.packed import LIMIT, Packed, Rounding, affine_group, pack_edited
from vauban.edits.update import Update
from vauban.errors import InputError

PRECISIONS = (None, "same", "8bit", "float", "adapter")


def store_packed(
    module: nn.Module, update: Update, precision: str | None, rounding: Rounding = "two-sided"
) -> Packed | None:
    """The edited matrix packed, or None where it is to be stored as floats.

    A packed module keeps its format (None, "same") as long as what is left of the direction in it
    is within `LIMIT` of what was planned; then 8 bits, then the float type are taken, by name in
    the report. A module whose width no group divides goes from its own format to floats.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}; expected None or one of {PRECISIONS[1:]}")
    packed = "scales" in module
    widths: list[int | None] = []
    if packed and precision in (None, "same"):
        widths.append(None)
    if (packed and precision != "float") or precision == "8bit":
        # A width that no group divides cannot be packed anew.
        widths += [8] if affine_group(module) else []
    for bits in widths:
        found = None  # What was too far from planned is let go first.
        found = pack_edited(module, update, bits=bits, rounding=rounding)
        if found.missed <= LIMIT:
            return found
    return None
