"""Weight edits as low-rank updates: on flat dictionaries, and planned over a whole model."""

from vauban.edits.directions import biproject, sparsify_direction
from vauban.edits.exact import quantize_direction_exact
from vauban.edits.flat import cut, cut_biprojected, cut_subspace
from vauban.edits.packed import Packed, Rounding, pack_edited
from vauban.edits.plan import EditPlan, Leakage, has_untie_switch, plan_cut, store
from vauban.edits.update import Update

__all__ = [
    "EditPlan",
    "Leakage",
    "Packed",
    "Rounding",
    "Update",
    "biproject",
    "cut",
    "cut_biprojected",
    "cut_subspace",
    "has_untie_switch",
    "pack_edited",
    "plan_cut",
    "quantize_direction_exact",
    "sparsify_direction",
    "store",
]
