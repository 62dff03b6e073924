"""Everything that sees a model: loading, its anatomy, writers, the forward pass, generation."""

from vauban.models.anatomy import Anatomy, anatomy
from vauban.models.batching import (
    batches,
    can_pad,
    can_share,
    prefix_cache,
    repeated,
    row_checks,
    shared_prefix,
)
from vauban.models.families import family_of
from vauban.models.forward import ForwardOutput, forward
from vauban.models.generate import decode, eos_ids, generate, generate_tokens
from vauban.models.loading import (
    DeviceInfo,
    ModelInfo,
    check_safetensors,
    describe,
    device_info,
    load,
    model_folder,
    organism_path,
)
from vauban.models.taps import Stream, tapped
from vauban.models.verify import ForwardCheck, verify_forward
from vauban.models.writers import WRITER_NAMES, Writer, branches, norm_gain, residual_writers

__all__ = [
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
    "forward",
    "generate",
    "generate_tokens",
    "load",
    "model_folder",
    "norm_gain",
    "organism_path",
    "prefix_cache",
    "repeated",
    "residual_writers",
    "row_checks",
    "shared_prefix",
    "tapped",
    "verify_forward",
]
