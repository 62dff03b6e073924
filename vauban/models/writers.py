"""Residual writers: every matrix whose output is added to the residual stream.

A rule over names; `module_probe` checks it by experiment. Knows modules and their names;
computes no edit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from vauban.errors import ArchitectureError
from vauban.models import families
from vauban.models.anatomy import (
    Branch,
    anatomy,
    embedding_size,
    multiplier,
    position_tables,
    post_norms,
)
from vauban.models.notes import notes

# Last names of modules that write to the stream, over all of mlx-lm's model files.
WRITER_NAMES = frozenset({
    "o_proj", "out_proj", "dense", "wo", "c_proj", "attn_out", "attn_resid", "linear_out",
    "o_b_proj", "down_proj", "w2", "fc2", "fc_out", "dense_4h_to_h", "proj_2", "output_linear",
    "ff_out", "mlp_resid", "per_layer_projection", "linear_right", "post_expert_proj",
})  # fmt: skip
_ATTENTION = re.compile(r"attn|attention|temporal_block")
_SSM = re.compile(r"mamba|ssm|linear_attn|conv|delta|recurrent|timemixing")
_CHANNELS = re.compile(r"channelmixing")
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

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> writer = vauban.residual_writers(model)[1]
    >>> writer.path, writer.kind, writer.shape
    ('model.layers.0.self_attn.o_proj', 'attention', (128, 128))
    """

    path: str
    layer: int
    kind: str
    shape: tuple[int, ...]
    gain: mx.array | None
    bias: bool
    quantization: dict[str, Any] | None


def quantization_of(module: nn.Module) -> dict[str, Any] | None:
    """{"bits", "group_size", "mode"} of a packed module, None of a float one.

    `mode` is mlx's, or "ternary" and "hadamard" for packings that mlx cannot unpack as they are.
    """
    special = families.own_packing(module)
    if "scales" not in module:
        return None if special is None else {"bits": 2, "group_size": 4, "mode": special}
    return {
        "bits": int(module.bits),
        "group_size": int(module.group_size),
        "mode": special or getattr(module, "mode", "affine"),
    }


def unpacked_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of the matrix that a plain or packed module stands for."""
    shape = [int(n) for n in module.weight.shape]
    packed = quantization_of(module)
    if packed and packed["mode"] == "ternary":
        return int(module.out_features), int(module.in_features)
    if packed:
        shape[-1] = shape[-1] * 32 // packed["bits"]
    return tuple(shape)


def is_matrix(path: str, module: nn.Module) -> bool:
    """Whether a module is one matrix that vauban can read.

    Raises ArchitectureError for a matrix in a form that it cannot read: no writer is passed over
    in silence.
    """
    if isinstance(module, _LINEAR + _SWITCH) or families.own_packing(module):
        return True
    if "lora_a" in module:
        raise ArchitectureError(f"{path} carries an adapter; fuse it first (mlx_lm fuse)")
    weight = module.get("weight")
    if isinstance(weight, mx.array) and weight.ndim > 1 and not module.children():
        raise ArchitectureError(
            f"{path} is a {type(module).__name__}; vauban does not know how its matrix is stored"
        )
    return False


def _kind(inside: str, module: nn.Module, layer: nn.Module) -> str:
    """A writer's kind, by its path `inside` the block and the classes on the way."""
    if "share" in inside:
        return "shared_expert"
    if isinstance(module, _SWITCH) or "experts" in inside:
        return "expert"
    node: Any = layer
    names = []
    for part in inside.split(".")[:-1]:
        node = node[int(part)] if part.isdigit() else node[part]
        names += [part.lower(), type(node).__name__.lower()]
    if any(_CHANNELS.search(name) for name in names):
        return "mlp"
    if any(_SSM.search(name) for name in names):
        return "ssm"
    if any(_ATTENTION.search(name) for name in names):
        return "attention"
    return "attention" if inside in ("o_proj", "out_proj", "attn_out") else "mlp"


def norm_gain(norm: nn.Module, size: int) -> mx.array:
    """The diagonal gain g (size,) of an RMS norm, read off by running it on ones.

    norm(1) = g / sqrt(1 + eps), whatever the class does with its weight (Gemma uses 1 + w); the
    scalar does not matter to a direction.
    """
    return norm(mx.ones((1, size))).reshape(-1).astype(mx.float32)


def _gain(layer: nn.Module, kind: str, inside: str, size: int) -> mx.array | None:
    """The product of all norms' gains between a writer and the stream; None without a norm."""
    if inside == "per_layer_projection":
        names = ["post_per_layer_input_norm"]
    elif kind in ("attention", "ssm"):
        names = [post_norms(layer).get("attention", "")]
    else:
        last = post_norms(layer).get("mlp", "")
        # Gemma 4 norms its dense and its routed half before it norms their sum.
        names = [f"{last}_{2 if kind == 'expert' else 1}", last]
    gains = [norm_gain(layer[n], size) for n in names if isinstance(layer.get(n), nn.Module)]
    if not gains:
        return None
    return gains[0] * gains[1] if len(gains) == 2 else gains[0]


def _before_blocks(model: nn.Module) -> list[Writer]:
    """What builds the stream: the embedding, learned positions (GPT-2's kind), n-gram tables."""
    parts = anatomy(model)
    size = (parts.vocabulary, parts.d_model)
    packed = quantization_of(parts.embedding)
    writers = [Writer(parts.embedding_path, -1, "embedding", size, None, False, packed)]
    for path, table in position_tables(model):
        packed = quantization_of(table)
        writers.append(Writer(path, -1, "other", embedding_size(table), None, False, packed))
    more = families.BEFORE_BLOCKS.get(families.family_of(model))
    for path, module in model.named_modules():
        if more and more in path and is_matrix(path, module):
            # A matrix, not a table: its outputs are written, not its rows.
            writers.append(_writer(path, -1, "mlp", module, None))
    return writers


def _writer(path: str, layer: int, kind: str, module: nn.Module, gain: mx.array | None) -> Writer:
    return Writer(
        path, layer, kind, unpacked_shape(module), gain, "bias" in module, quantization_of(module)
    )


def residual_writers(model: nn.Module) -> list[Writer]:
    """All residual writers of `model`: the embedding first, then block by block.

    Raises ArchitectureError for a block without any writer, unless its family is known to have
    such blocks, and for a writer in a form that vauban cannot read: a cut would silently leave the
    direction in it.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> [writer.kind for writer in residual_writers(model)][:3]
    ['embedding', 'attention', 'mlp']
    """
    parts = anatomy(model)
    family = families.family_of(model)
    names = WRITER_NAMES | families.MORE_WRITERS.get(family, frozenset())
    excluded = families.NOT_WRITERS.get(family, frozenset())
    writers = _before_blocks(model)
    for index, (layer, path) in enumerate(zip(parts.layers, parts.layer_paths, strict=True)):
        inner = []
        for inside, module in layer.named_modules():
            if inside.split(".")[-1] not in names or inside in excluded:
                continue
            if not is_matrix(f"{path}.{inside}", module):
                continue
            if unpacked_shape(module)[-2] != parts.d_model:
                continue
            kind = _kind(inside, module, layer)
            gain = _gain(layer, kind, inside, parts.d_model)
            inner.append(_writer(f"{path}.{inside}", index, kind, module, gain))
        if not inner and not families.no_operation(family, layer):
            raise ArchitectureError(
                f"block {index} of {family} has no residual writer that vauban knows "
                f"(children: {', '.join(sorted(layer.children()))}); a cut would leave it untouched"
            )
        # named_modules walks depth first from the end; the stream's own order reads better.
        writers.extend(sorted(inner, key=lambda w: (w.kind not in ("attention", "ssm"), w.path)))
    return writers


def branches(model: nn.Module) -> list[Branch]:
    """The terms that each block adds to the stream, and the module that puts each of them out.

    There is one attention-side and one MLP-side term per block; its module is the norm behind it,
    or else the outermost module around the writer that is called. Raises ArchitectureError where no
    module puts the whole term out: a writer that is the block's child, two terms on a side,
    several streams.
    """
    parts = anatomy(model)
    if notes(model).several_streams:
        raise ArchitectureError(
            f"{families.family_of(model)} carries several streams and weighs each term for each of "
            "them; use sites=('block_input',) or a run-time cut (EditPlan.virtual())"
        )
    named = families.TERMS.get(families.family_of(model), {})
    terms: dict[tuple[int, str], Branch] = {}
    for writer in residual_writers(model):
        if writer.layer < 0:
            continue
        layer, path = parts.layers[writer.layer], parts.layer_paths[writer.layer]
        inside = writer.path[len(path) + 1 :]
        side = "attention" if writer.kind in ("attention", "ssm") else "mlp"
        name = post_norms(layer).get(side) or named.get(side) or _called(layer, inside)
        if "." not in inside:
            raise ArchitectureError(
                f"{writer.path} writes to the stream directly; no module puts {side}_output out. "
                "Use sites=('block_input',) or a run-time cut (EditPlan.virtual())"
            )
        site = f"{side}_output"
        known = terms.get((writer.layer, site))
        if known is not None and known.path != f"{path}.{name}":
            raise ArchitectureError(
                f"block {writer.layer} adds two {side} terms to the stream ({known.path}, "
                f"{path}.{name}); use sites=('block_input',) or a run-time cut"
            )
        terms[writer.layer, site] = Branch(
            writer.layer, site, f"{path}.{name}", dict(layer.named_modules())[name],
            multiplier(layer),
        )  # fmt: skip
    return [terms[key] for key in sorted(terms)]


def _called(layer: nn.Module, inside: str) -> str:
    """The outermost module on the way to a writer that can be called; containers cannot."""
    modules = dict(layer.named_modules())
    names = inside.split(".")
    paths = [".".join(names[: k + 1]) for k in range(len(names))]
    return next(p for p in paths if p in modules and callable(modules[p]))
