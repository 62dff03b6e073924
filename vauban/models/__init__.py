"""Everything that sees a model: loading, its anatomy, writers, the forward pass, generation."""

from vauban.models.anatomy import Anatomy, anatomy
from vauban.models.batching import (
    batches,
    prefix_cache,
    repeated,
    shared_prefix,
    token_budget,
)
from vauban.models.families import NOT_CUTTABLE, family_of
from vauban.models.forward import forward
from vauban.models.generate import decode, eos_ids, generate, generate_tokens
from vauban.models.loading import (
    DeviceInfo,
    ModelInfo,
    check_safetensors,
    describe,
    device_info,
    faster_twin,
    folder_of,
    in_memory,
    load,
    load_tokenizer,
    model_folder,
    organism_path,
)
from vauban.models.notes import forget
from vauban.models.passes import ForwardOutput
from vauban.models.paths import unembed
from vauban.models.rows import can_pad, can_share, row_checks
from vauban.models.taps import Stream, tapped
from vauban.models.verify import ForwardCheck, verify_forward
from vauban.models.writers import WRITER_NAMES, Writer, branches, norm_gain, residual_writers

__all__ = [
    "NOT_CUTTABLE",
    "WRITER_NAMES",
    "Anatomy",
    "DeviceInfo",
    "ForwardCheck",
    "ForwardOutput",
    "ModelInfo",
    "Stream",
    "Writer",
    "anatomy",
    "batches",
    "branches",
    "can_pad",
    "can_share",
    "check_safetensors",
    "decode",
    "describe",
    "device_info",
    "eos_ids",
    "family_of",
    "faster_twin",
    "folder_of",
    "forget",
    "forward",
    "generate",
    "generate_tokens",
    "in_memory",
    "load",
    "load_tokenizer",
    "model_folder",
    "norm_gain",
    "organism_path",
    "prefix_cache",
    "repeated",
    "residual_writers",
    "row_checks",
    "shared_prefix",
    "tapped",
    "token_budget",
    "unembed",
    "verify_forward",
]
