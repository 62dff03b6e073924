"""Cuts on a flat dictionary of weights, as the tutorial has it: `dict(tree_flatten(parameters))`.

Knows parameter names and shapes; sees no module. Where names and shapes do not determine the
answer (a post-norm, an unknown packing) it refuses and points to `plan_cut`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping

import mlx.core as mx

from vauban.edits.directions import as_basis, biproject
from vauban.edits.lowrank import NormMode, cut_matrix, remove_from_bias, share_left
from vauban.errors import InputError, VaubanWarning
from vauban.models import WRITER_NAMES

_BLOCK = re.compile(r"^(?P<head>.*?\b(?:layers|h|blocks|block)\.(?P<index>\d+))\.(?P<inside>.+)$")
_POST_NORMS = (
    "post_feedforward_layernorm",
    "post_mlp_layernorm",
    "post_mlp_norm",
    "post_mixer_norm",
)
# The matrix whose rows are the inputs of a writer, by the writer's last name.
_SIBLINGS = {
    "o_proj": ("q_proj",),
    "dense": ("q_proj",),
    "out_proj": ("q_proj",),
    "down_proj": ("up_proj", "gate_proj"),
    "w2": ("w1", "w3"),
    "fc2": ("fc1",),
}
Weights = Mapping[str, mx.array]


def cut(
    weights: Weights,
    direction: mx.array,
    target_layers: Iterable[int],
    alpha: float = 1.0,
    norm_preserve: bool | str = False,
    layer_weights: Mapping[int, float] | None = None,
) -> dict[str, mx.array]:
    """W <- W - α d (d^T W) for every attention and MLP writer of the target blocks.

    All experts and the writers' biases are included, the embedding never. Returns a new
    dictionary; dtypes are kept; packed writers come back as floats (their scales and biases are
    dropped; `export_model` writes the matching configuration). `norm_preserve` True is "row" as
    the tutorial has it, which puts part of the direction back (a warning names how much);
    "column" does not. `layer_weights` {block: factor on α}.

    Arditi et al. 2024 (arXiv 2406.11717), eq. 5. Raises InputError for a direction that is zero
    or of the wrong length, a block without a writer, post-norms and packings that cannot be read.

    >>> import mlx.core as mx
    >>> weights = {"model.layers.0.mlp.down_proj.weight": mx.ones((2, 3))}
    >>> after = cut(weights, mx.array([1.0, 0.0]), [0])
    >>> after["model.layers.0.mlp.down_proj.weight"].tolist()
    [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    """
    return cut_subspace(weights, direction, target_layers, alpha, norm_preserve, layer_weights)


def cut_biprojected(
    weights: Weights,
    refusal_direction: mx.array,
    harmless_direction: mx.array,
    target_layers: Iterable[int],
    alpha: float = 1.0,
    norm_preserve: bool | str = False,
) -> dict[str, mx.array]:
    """`cut` along the part of the refusal direction that is orthogonal to the harmless one.

    Pass the harmless mean of the layer, `result.harmless_mean(result.layer_index)`. Raises
    InputError when the two directions are parallel.
    """
    return cut(
        weights,
        biproject(refusal_direction, harmless_direction),
        target_layers,
        alpha,
        norm_preserve,
    )


def cut_subspace(
    weights: Weights,
    basis: mx.array,
    target_layers: Iterable[int],
    alpha: float = 1.0,
    norm_preserve: bool | str = False,
    layer_weights: Mapping[int, float] | None = None,
) -> dict[str, mx.array]:
    """`cut` along all rows of `basis` (k, d) jointly; the rows need not be orthogonal."""
    rows = as_basis(basis, "cut")
    layers = _target_layers(weights, target_layers)
    mode: NormMode = {False: None, True: "row"}.get(norm_preserve, norm_preserve)  # type: ignore[arg-type]
    _refuse_post_norms(weights)
    cutting = dict(weights)
    left = 0.0
    for layer in layers:
        factor = alpha * (layer_weights or {}).get(layer, 1.0)
        found = _writers_of(weights, layer, int(rows.shape[1]))
        if not found:
            raise InputError(
                f"block {layer} has no residual writer among its parameters; the direction would "
                "stay in. Names end in o_proj, down_proj, ...: see vauban.models.WRITER_NAMES"
            )
        for path in found:
            weight = _float_weight(weights, path, int(rows.shape[1]))
            done = cut_matrix(weight, rows, factor, mode)
            if mode == "row":
                left = max(left, share_left(done, weight, rows))
            cutting[f"{path}.weight"] = done.astype(weight.dtype)
            for packed in ("scales", "biases"):
                cutting.pop(f"{path}.{packed}", None)
            bias = weights.get(f"{path}.bias")
            if bias is not None:
                cutting[f"{path}.bias"] = remove_from_bias(bias, rows, factor).astype(bias.dtype)
    if mode == "row":
        warnings.warn(
            f"row norm preservation puts back up to {left:.1%} of the direction; "
            "norm_preserve='column' keeps the norms of the columns and leaves none",
            VaubanWarning,
            stacklevel=2,
        )
    return cutting


def _target_layers(weights: Weights, target_layers: Iterable[int]) -> list[int]:
    found = {int(m["index"]) for name in weights if (m := _BLOCK.match(name))}
    layers = sorted({int(i) for i in target_layers})
    if not layers:
        raise InputError("target_layers is empty; name at least one block")
    if not found:
        raise InputError("the weights hold no blocks (names like model.layers.0.…)")
    outside = [i for i in layers if i not in found]
    if outside:
        raise InputError(f"block {outside[0]} does not exist; the weights hold 0 to {max(found)}")
    return layers


def _refuse_post_norms(weights: Weights) -> None:
    for name in weights:
        if any(part in _POST_NORMS for part in name.split(".")):
            raise InputError(
                f"{name}: a norm stands between the writers and the residual stream, so a cut "
                "along the plain direction would leak; use plan_cut(model, direction), which "
                "corrects for its gain"
            )


def _writers_of(weights: Weights, layer: int, size: int) -> list[str]:
    """Paths of the matrices of one block that write to a stream of `size` components."""
    found = []
    for name, value in weights.items():
        match = _BLOCK.match(name)
        if not match or int(match["index"]) != layer or not name.endswith(".weight"):
            continue
        path = name.removesuffix(".weight")
        last = path.split(".")[-1]
        if last not in WRITER_NAMES or value.ndim < 2:
            continue
        if value.shape[-2] != size:
            raise InputError(
                f"the direction has {size} components, but {path} writes {value.shape[-2]}"
            )
        found.append(path)
    return found


def _float_weight(weights: Weights, path: str, size: int) -> mx.array:
    weight = weights[f"{path}.weight"]
    scales = weights.get(f"{path}.scales")
    if scales is None:
        if not mx.issubdtype(weight.dtype, mx.floating):
            raise InputError(f"{path}.weight is {weight.dtype} without scales; expected floats")
        return weight
    bits, group = _packing(weights, path, size)
    offsets = weights.get(f"{path}.biases")
    if offsets is not None:
        return mx.dequantize(
            weight, scales.astype(mx.float32), offsets.astype(mx.float32), group, bits
        ).astype(scales.dtype)
    mode = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}[bits, group]
    return mx.dequantize(weight, scales, None, group, bits, mode=mode, dtype=mx.bfloat16)


def _packing(weights: Weights, path: str, size: int) -> tuple[int, int]:
    """(bits, group size) of a packed writer, from its sibling's rows.

    A packed row says in·bits/32 and in/group, not `in` itself; the sibling that feeds the writer
    has `in` rows, and reads the stream of `size` components, so its own packing is certain.
    """
    parent, _, last = path.rpartition(".")
    packed, scales = weights[f"{path}.weight"].shape[-1], weights[f"{path}.scales"].shape[-1]
    for name in _SIBLINGS.get(last, ()):
        sibling = weights.get(f"{parent}.{name}.weight")
        if sibling is None:
            continue
        width = int(sibling.shape[-2])
        bits, group = packed * 32 / width, width / scales
        own = weights.get(f"{parent}.{name}.scales")
        certain = own is None or size / own.shape[-1] == group
        if certain and bits in (2, 3, 4, 5, 6, 8) and group in (16, 32, 64, 128):
            return int(bits), int(group)
    raise InputError(
        f"the packing of {path} cannot be read from the dictionary alone; use "
        "plan_cut(model, direction), which knows each module's bits and group size"
    )
