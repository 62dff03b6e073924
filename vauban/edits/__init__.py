"""Weight edits as low-rank updates: on flat dictionaries, and planned over a whole model."""

from vauban.edits.directions import biproject, sparsify_direction
from vauban.edits.flat import cut, cut_biprojected, cut_subspace
from vauban.edits.plan import EditPlan, Leakage, Update, has_untie_switch, plan_cut

__all__ = [
    "EditPlan",
    "Leakage",
    "Update",
    "biproject",
    "cut",
    "cut_biprojected",
    "cut_subspace",
    "has_untie_switch",
    "plan_cut",
    "sparsify_direction",
]
