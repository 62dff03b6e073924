"""In which format an edited module is stored: its own, 8 bits, or floats. Knows mlx modules."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.nn as nn

from vauban.edits.moments import Energy
from vauban.edits.packed import LIMIT, Packed, affine_group, pack_edited
from vauban.edits.update import Update
from vauban.errors import InputError

PRECISIONS = (None, "same", "8bit", "float", "adapter")


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
    widths: list[int | None] = []
    if packed and precision in (None, "same"):
        widths.append(None)
    if (packed and precision != "float") or precision == "8bit":
        # A width that no group divides cannot be packed anew.
        widths += [8] if affine_group(module) else []
    for bits in widths:
        stored = pack_edited(module, update, energies, bits=bits)
        if stored.missed <= LIMIT:
            return stored
    return None
