"""Weight edits as low-rank updates: on flat dictionaries, and planned over a whole model.

In reading order:
    lowrank            the mathematics of a cut, norm modes, what is left of a direction
    directions         what is done to a direction before the cut: biprojection, sparsification
    options            strengths, blocks and factors as callers give them, checked once
    flat_weights       `cut` and its variants on a dictionary of weights
    null_space         the inputs to be preserved, and rows that do not touch them
    sparse             sparse direction surgery: cut only the rows that carry most
    update             one writer's change as a value
    preservation_keys  the inputs of each matrix, gathered from prompts
    modules            packed and float forms of mlx modules
    blocks             a matrix read in float32 part by part; the edited one as a stream of rows
    writer_scales      how strongly each writer writes each coordinate, from weights alone
    packed             an edited matrix packed again, exactly along its direction
    embedding          a shared embedding: cut, untied or kept
    affine_cut         constants instead of zero along the direction
    plan               `EditPlan`: the whole edit as a value
    conveniences       its methods that call what lies to the right
    planner            `plan_cut`: from options to a plan
    run_time           the plan's run-time form, and what it leaves
    protection         what null-space protection let through
"""

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
from vauban.edits.writer_scales import WriterScale, writer_scales

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
    "WriterScale",
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
    "writer_scales",
]
