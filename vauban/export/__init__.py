"""Checkpoints on disk: staged, streamed, read back. Nothing else in vauban writes weights.

In reading order:
    calibrate           what the packed writers of a plan read, for rounding
    apply               a planned edit made in memory
    source              a checkpoint opened without reading its weights
    origins             which stored tensors a parameter was made of
    expert_stacks       stacked experts, read from the file one by one
    tensor_files        safetensors as a stream of tensors
    transformers_names  the names of transformers for mlx-lm's parameters
    layout              whose names and shapes the weights get
    side_files          what goes along with the weights, and what stays behind
    checkpoint          the edited folder: tensors, index, configuration, side files
    peft_adapter        the edit as a PEFT adapter
    adapter             the edit as a LoRA adapter instead
    control_vector      a direction as a GGUF file for llama.cpp
    programs            which programs open an exported folder
    edit_record         edit.vauban: what was planned, kept beside the weights
    interrupted         a killed export goes on where it stopped
    model_match         whether a folder stores what the plan's model holds
    disk                what can be known of the disk beforehand: access, room
    staging             an output folder appears complete or not at all
    read_back           what a stored matrix writes along a basis
    compare_logits      the written model against the run-time cut
    export_report       the figures, and whether they are as planned
    verification        reopen a folder and report
    write               the verbs: export_plan, write_plan, export_model
    fact_edits          a model with edited facts, and their ledger
"""

from vauban.export.adapter import check_adaptable, is_adapter
from vauban.export.apply import apply_plan
from vauban.export.calibrate import CalibratedPlan
from vauban.export.compare_logits import logits_difference
from vauban.export.control_vector import check_control_vector, export_control_vector
from vauban.export.disk import check_place, check_room, export_bytes
from vauban.export.export_report import ExportReport
from vauban.export.fact_edits import export_facts
from vauban.export.interrupted import RECORD, resume_key, start_record
from vauban.export.staging import check_output, staged
from vauban.export.verification import verify_export
from vauban.export.write import check_layout, export_model, export_plan, write_plan

__all__ = [
    "RECORD",
    "CalibratedPlan",
    "ExportReport",
    "apply_plan",
    "check_adaptable",
    "check_control_vector",
    "check_layout",
    "check_output",
    "check_place",
    "check_room",
    "export_bytes",
    "export_control_vector",
    "export_facts",
    "export_model",
    "export_plan",
    "is_adapter",
    "logits_difference",
    "resume_key",
    "staged",
    "start_record",
    "verify_export",
    "write_plan",
]
