"""Residual writers: every matrix whose output is added to the residual stream.

A static rule over names, checked against the numeric probe of the forward pass elsewhere. Knows
modules and their names; computes no edit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from vauban.errors import ArchitectureError
from vauban.models.anatomy import (
    Branch,
    anatomy,
    embedding_size,
    multiplier,
    position_tables,
    post_norms,
)

# Last names of modules that write to the stream, over all of mlx-lm's model files.
WRITER_NAMES = frozenset(
    {
        "o_proj",
        "out_proj",
        "dense",
        "wo",
        "c_proj",
        "attn_out",
        "attn_resid",
        "linear_out",
        "o_b_proj",
        "down_proj",
        "w2",
        "fc2",
        "fc_out",
        "dense_4h_to_h",
        "proj_2",
        "output_linear",
        "ff_out",
        "mlp_resid",
        "per_layer_projection",
        "linear_right",
        "post_expert_proj",
    }
)
_ATTENTION = re.compile(r"attn|attention|self_attention|temporal_block")
_SSM = re.compile(r"mamba|ssm|linear_attn|conv|delta|recurrent|rwkv")
_LINEAR = (nn.Linear, nn.QuantizedLinear)
_SWITCH = (SwitchLinear, QuantizedSwitchLinear)


@dataclass(frozen=True, eq=False)
class Writer:
    """One residual writer.

    `path` as in `model.named_modules()`; `layer` the block, -1 for the embedding; `kind` one of
    embedding, attention, mlp, expert, shared_expert, ssm, other; `shape` (out, in) of the
    unpacked matrix, with a leading number of experts; `gain` (out,) of the post-norm between the
    writer and the stream, None without one; `bias` whether it has one; `quantization` None or
    {"bits", "group_size", "mode"}.
    """

    path: str
    layer: int
    kind: str
    shape: tuple[int, ...]
    gain: mx.array | None
    bias: bool
    quantization: dict[str, Any] | None


def quantization_of(module: nn.Module) -> dict[str, Any] | None:
    """{"bits", "group_size", "mode"} of a packed module, None of a float one."""
    if "scales" not in module:
        return None
    return {
        "bits": int(module.bits),
        "group_size": int(module.group_size),
        "mode": getattr(module, "mode", "affine"),
    }


def unpacked_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of the matrix that a plain or packed module stands for."""
    shape = [int(n) for n in module.weight.shape]
    packed = quantization_of(module)
    if packed:
        shape[-1] = shape[-1] * 32 // packed["bits"]
    return tuple(shape)


def _kind(inside: str, module: nn.Module) -> str:
    """`inside` is the path below the block."""
    if "shared" in inside:
        return "shared_expert"
    if isinstance(module, _SWITCH) or "experts" in inside:
        return "expert"
    parts = inside.split(".")[:-1]
    if any(_SSM.search(part) for part in parts):
        return "ssm"
    if any(_ATTENTION.search(part) for part in parts) or parts == []:
        return "attention" if parts or inside in ("o_proj", "out_proj", "attn_out") else "mlp"
    return "mlp"


def norm_gain(norm: nn.Module, size: int) -> mx.array:
    """The diagonal gain g (size,) of an RMS norm, read off by running it on ones.

    norm(1) = g / sqrt(1 + eps), whatever the class does with its weight (Gemma uses 1 + w); the
    scalar does not matter to a direction.
    """
    return norm(mx.ones((1, size))).reshape(-1).astype(mx.float32)


def residual_writers(model: nn.Module) -> list[Writer]:
    """All residual writers of `model`: the embedding first, then block by block.

    Raises ArchitectureError for a block without any writer, because a cut there would silently
    leave the direction in.
    """
    parts = anatomy(model)
    writers = [
        Writer(
            parts.embedding_path,
            -1,
            "embedding",
            (parts.vocabulary, parts.d_model),
            None,
            False,
            quantization_of(parts.embedding),
        )
    ]
    # Learned positions (GPT-2's kind) are added to the stream as well.
    for path, table in position_tables(model):
        size = embedding_size(table)
        writers.append(Writer(path, -1, "other", size, None, False, quantization_of(table)))
    for index, (layer, path) in enumerate(zip(parts.layers, parts.layer_paths, strict=True)):
        gains = {
            branch: norm_gain(layer[name], parts.d_model)
            for branch, name in post_norms(layer).items()
        }
        found = []
        for inside, module in layer.named_modules():
            if inside.split(".")[-1] not in WRITER_NAMES or not isinstance(
                module, _LINEAR + _SWITCH
            ):
                continue
            shape = unpacked_shape(module)
            if shape[-2] != parts.d_model:
                continue
            kind = _kind(inside, module)
            gain = gains.get("attention" if kind in ("attention", "ssm") else "mlp")
            if inside == "per_layer_projection" and "post_per_layer_input_norm" in layer:
                gain = norm_gain(layer["post_per_layer_input_norm"], parts.d_model)
            found.append(
                Writer(
                    f"{path}.{inside}",
                    index,
                    kind,
                    shape,
                    gain,
                    "bias" in module,
                    quantization_of(module),
                )
            )
        if not found:
            raise ArchitectureError(
                f"block {index} of {type(model).__name__} has no residual writer that vauban knows "
                f"(children: {', '.join(sorted(layer.children()))}); a cut would leave it untouched"
            )
        # named_modules walks depth first from the end; the stream's own order reads better.
        writers.extend(sorted(found, key=lambda w: (w.kind not in ("attention", "ssm"), w.path)))
    return writers


def branches(model: nn.Module) -> list[Branch]:
    """The terms each block adds to the stream: the block's child that holds a writer, or its norm.

    One attention-side and one MLP-side term per block. Raises ArchitectureError where a writer is
    the block's own child, because then no module puts the whole term out.
    """
    parts = anatomy(model)
    found: dict[tuple[int, str], Branch] = {}
    for writer in residual_writers(model):
        if writer.layer < 0:
            continue
        layer, path = parts.layers[writer.layer], parts.layer_paths[writer.layer]
        child, *rest = writer.path[len(path) + 1 :].split(".")
        side = "attention" if writer.kind in ("attention", "ssm") else "mlp"
        if not rest and child not in post_norms(layer).values():
            raise ArchitectureError(
                f"{writer.path} writes to the stream directly; {side}_output is no module here. "
                "Use sites=('block_input',) or a run-time cut (EditPlan.virtual())"
            )
        name = post_norms(layer).get(side, child)
        site = f"{side}_output"
        known = found.get((writer.layer, site))
        if known is not None and known.path != f"{path}.{name}":
            raise ArchitectureError(
                f"block {writer.layer} adds two {side} terms to the stream ({known.path}, "
                f"{path}.{name}); use sites=('block_input',) or a run-time cut"
            )
        found[writer.layer, site] = Branch(
            writer.layer, site, f"{path}.{name}", layer[name], multiplier(layer)
        )
    return [found[key] for key in sorted(found)]
