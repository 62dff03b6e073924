"""Weight edits as low-rank updates: on flat dictionaries, and planned over a whole model."""

from vauban.edits.directions import biproject, sparsify_direction
from vauban.edits.edit_plan import EditPlan, Leakage
from vauban.edits.exact import quantize_direction_exact
from vauban.edits.flat import cut, cut_biprojected, cut_subspace
from vauban.edits.heads import has_untie_switch
from vauban.edits.null_space import NullSpace, null_space
from vauban.edits.packed import Packed, Rounding, pack_edited
from vauban.edits.plan import plan_cut
from vauban.edits.preservation import (
    PreservationKeys,
    Preserve,
    collect_preservation_keys,
)
from vauban.edits.protection import ProtectionReport, WriterProtection, protection_report
from vauban.edits.sparse import (
    SparseDirectionSurgeon,
    SparseProjectionResult,
    SparseSurgeryPlan,
)
from vauban.edits.storing import store_packed
from vauban.edits.update import Update

__all__ = [
    "EditPlan",
    "Leakage",
    "NullSpace",
    "Packed",
    "PreservationKeys",
    "Preserve",
    "ProtectionReport",
    "Rounding",
    "SparseDirectionSurgeon",
    "SparseProjectionResult",
    "SparseSurgeryPlan",
    "Update",
    "WriterProtection",
    "biproject",
    "collect_preservation_keys",
    "cut",
    "cut_biprojected",
    "cut_subspace",
    "has_untie_switch",
    "null_space",
    "pack_edited",
    "plan_cut",
    "protection_report",
    "quantize_direction_exact",
    "sparsify_direction",
    "store_packed",
]
