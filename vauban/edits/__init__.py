"""Weight edits as low-rank updates: on flat dictionaries, and planned over a whole model."""

from vauban.edits.directions import biproject, sparsify_direction
from vauban.edits.embedding import has_untie_switch
from vauban.edits.flat_weights import cut, cut_biprojected, cut_subspace
from vauban.edits.null_space import NullSpace, null_space
from vauban.edits.packed import Packed, pack_edited, quantize_direction_exact, store_packed
from vauban.edits.plan import EditPlan
from vauban.edits.planner import plan_cut
from vauban.edits.preservation_keys import (
    PreservationKeys,
    Preserve,
    collect_preservation_keys,
)
from vauban.edits.protection import ProtectionReport, WriterProtection, protection_report
from vauban.edits.run_time import Leakage
from vauban.edits.sparse import (
    SparseDirectionSurgeon,
    SparseProjectionResult,
    SparseSurgeryPlan,
)
from vauban.edits.update import Update

__all__ = [
    "EditPlan",
    "Leakage",
    "NullSpace",
    "Packed",
    "PreservationKeys",
    "Preserve",
    "ProtectionReport",
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
