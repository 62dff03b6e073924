"""Packed and float forms of the modules that hold writers. Knows mlx modules, no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from vauban._arrays import unpack
from vauban.errors import InputError
from vauban.models import quantization_of, unpacked_shape


def module_weight(module: nn.Module) -> mx.array:
    """The matrix in float32 when packed, in its own dtype when not."""
    refuse_unknown_packing(module)
    weight, scales, biases = (_whole(module.get(name)) for name in ("weight", "scales", "biases"))
    assert weight is not None
    if scales is None:
        return weight
    return unpack(
        weight, scales, biases, module.group_size, module.bits, getattr(module, "mode", "affine")
    )


def _whole(value: Any) -> mx.array | None:
    """An array, also of something that reads it expert by expert."""
    return value if value is None or isinstance(value, mx.array) else value.array()


_MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")


def refuse_unknown_packing(module: nn.Module) -> None:
    """InputError for packings that would be read wrongly.

    Those are ternary and rotated weights, and nvfp4 experts with a scale of their own. Their
    run-time cut is right all the same.
    """
    mode = quantization_of(module)
    if mode is not None and mode["mode"] not in _MODES:
        raise InputError(
            f"this matrix is packed as {mode['mode']}, which vauban does not rewrite; use the "
            "run-time cut (EditPlan.virtual())"
        )
    if getattr(module, "global_scale", None) is not None:
        raise InputError(
            "this matrix carries an nvfp4 global scale, which vauban does not unpack; convert the "
            "model without one"
        )


def affine_group(module: nn.Module) -> int | None:
    """The group size of a module packed anew: its own, 64, or what divides its width; else None."""
    affine = "scales" in module and getattr(module, "mode", "affine") == "affine"
    own = module.group_size if affine else 64
    width = unpacked_shape(module)[-1]
    return next((group for group in (own, 64, 128, 32) if width % group == 0), None)


@dataclass(frozen=True)
class PackedFormat:
    """A packed format, and whether it is the one that the module has."""

    bits: int
    group: int
    mode: str
    own: bool

    def read(self, arrays: dict[str, mx.array]) -> mx.array:
        """What is stored, in float32."""
        weight, scales, offsets = arrays["weight"], arrays["scales"], arrays.get("biases")
        return unpack(weight, scales, offsets, self.group, self.bits, self.mode)


def packed_format(module: nn.Module, path: str, bits: int | None) -> PackedFormat:
    """The format of a packed module (`bits` None), or affine with other bits.

    Raises InputError for an unpacked module without `bits`, a packing that would be read wrongly,
    and a width that no group divides.
    """
    refuse_unknown_packing(module)
    if "scales" in module and bits in (None, module.bits):
        mode = getattr(module, "mode", "affine")
        return PackedFormat(module.bits, module.group_size, mode, True)
    if bits is None:
        raise InputError(f"{path} is not packed; name the bits to pack it with")
    group = affine_group(module)
    if group is None:
        raise InputError(
            f"{path} has {unpacked_shape(module)[-1]} columns; packing takes a multiple of 32"
        )
    return PackedFormat(bits, group, "affine", False)


def float_module(module: nn.Module) -> nn.Module:
    """The same module with a float matrix; itself when it has one already."""
    refuse_unknown_packing(module)
    if "scales" not in module:
        return module
    weight = module_weight(module)
    dtype = module.scales.dtype if module.get("biases") is not None else mx.bfloat16
    if isinstance(module, nn.QuantizedEmbedding):
        twin: nn.Module = nn.Embedding(1, 1)
    elif isinstance(module, QuantizedSwitchLinear):
        twin = SwitchLinear(1, 1, 1, bias=False)
    else:
        twin = nn.Linear(1, 1, bias=False)
    twin.weight = weight.astype(dtype)
    if "bias" in module:
        twin.bias = module.bias
    return twin


def repacked_module(
    module: nn.Module, arrays: dict[str, mx.array], bits: int, group_size: int, mode: str
) -> nn.Module:
    """A packed module of the same kind with new arrays; the old one is left as it is."""
    options: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": mode}
    if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
        twin: nn.Module = nn.QuantizedEmbedding(32, 128, **options)
        rows, columns = arrays["scales"].shape
        twin.num_embeddings, twin.dims = rows, columns * group_size
    elif isinstance(module, SwitchLinear | QuantizedSwitchLinear):
        twin = QuantizedSwitchLinear(128, 32, 1, bias=False, **options)
    else:
        twin = nn.QuantizedLinear(128, 32, bias=False, **options)
    for name in ("weight", "scales", "biases"):
        if name in arrays:
            twin[name] = arrays[name]
    if "bias" in module:
        twin.bias = module.bias
    twin.freeze()
    return twin
