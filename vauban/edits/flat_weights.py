"""Cuts on a flat dictionary of weights, as the tutorial has it: `dict(tree_flatten(parameters))`.

Knows parameter names and shapes; sees no module. Where names and shapes do not determine the
answer (a post-norm, an unknown packing) it refuses and points to `plan_cut`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx

from vauban._common import largest
from vauban.edits.directions import biproject
from vauban.edits.lowrank import NormMode, cut_matrix, remove_from_bias, share_left
from vauban.edits.options import block_set, finite, layer_factors
from vauban.errors import InputError, VaubanWarning
from vauban.linalg import as_basis
from vauban.models import WRITER_NAMES, families

_BLOCK = re.compile(r"^(?P<head>.*?\b(?:layers|h|blocks|block)\.(?P<index>\d+))\.(?P<inside>.+)$")
_POST_NORMS = (
    "post_feedforward_layernorm",
    "post_mlp_layernorm",
    "post_mlp_norm",
    "post_mixer_norm",
)
# Writers whose last name means something else in other families, by their path below the block.
_MORE_WRITERS = frozenset(
    f"{parent}.{name}"
    for names in families.MORE_WRITERS.values()
    for name in names
    for parent in ("ffn", "mlp", "self_attn")
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
# Arrays of packings of a model's own (ternary, rotated), beside the matrix.
_OWN_PACKING = ("weight_scale", "signs")
_FLOAT_PACKINGS = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}
Weights = Mapping[str, mx.array]


def cut(
    weights: Weights,
    direction: Any,
    target_layers: Iterable[int] | int | str,
    alpha: float = 1.0,
    norm_preserve: bool | str = False,
    layer_weights: Mapping[int, float] | None = None,
) -> dict[str, mx.array]:
    """W <- W - α d (d^T W) for every attention and MLP writer of the target blocks.

    All experts and the writers' biases are included, the embedding never. Returns a new
    dictionary; dtypes are kept; packed writers come back as floats (their scales and biases are
    dropped; `export_model` writes the matching configuration). `norm_preserve` True is "row" as
    the tutorial has it, which puts part of the direction back (a warning names how much);
    "column" does not. `target_layers` is "all", a block or several; `layer_weights` {block: factor
    on α} names some of them. `direction` as in `plan_cut`, a (k, d) basis is cut jointly.

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
    refusal_direction: Any,
    harmless_direction: Any,
    target_layers: Iterable[int] | int | str,
    alpha: float = 1.0,
    norm_preserve: bool | str = False,
) -> dict[str, mx.array]:
    """`cut` along the part of the refusal direction that is orthogonal to the harmless one.

    Both are (d,), or results that hold one. Pass the harmless mean of the layer,
    `result.harmless_mean(result.layer_index)`. Raises InputError when the two are parallel.

    >>> import mlx.core as mx
    >>> weights = {"model.layers.0.mlp.down_proj.weight": mx.eye(2)}
    >>> after = cut_biprojected(weights, mx.array([0.6, 0.8]), mx.array([1.0, 0.0]), [0])
    >>> matrix = after["model.layers.0.mlp.down_proj.weight"]
    >>> bool(mx.allclose(matrix, mx.diag(mx.array([1.0, 0.0]))))
    True
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
    basis: Any,
    target_layers: Iterable[int] | int | str,
    alpha: float = 1.0,
    norm_preserve: bool | str = False,
    layer_weights: Mapping[int, float] | None = None,
) -> dict[str, mx.array]:
    """`cut` along all rows of `basis` (k, d) jointly; the rows need not be orthogonal.

    Raises InputError as `cut` does, and for rows that are linearly dependent.

    >>> import mlx.core as mx
    >>> weights = {"model.layers.0.mlp.down_proj.weight": mx.eye(3)}
    >>> after = cut_subspace(weights, mx.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]), "all")
    >>> [round(float(mx.abs(row).max()), 5) for row in after["model.layers.0.mlp.down_proj.weight"]]
    [0.0, 0.0, 1.0]
    """
    rows = as_basis(basis, "cut")
    _check_dictionary(weights)
    existing = {int(m["index"]) for name in weights if (m := _BLOCK.match(name))}
    if not existing:
        raise InputError("the weights hold no blocks (names like model.layers.0.…)")
    layers = sorted(block_set(target_layers, existing, "target_layers"))
    alpha, factors = finite(alpha, "alpha"), layer_factors(layer_weights, layers)
    mode: NormMode = {False: None, True: "row"}.get(norm_preserve, norm_preserve)  # type: ignore[arg-type]
    _refuse_post_norms(weights)
    cutting = dict(weights)
    shares: list[float] = []
    for layer in layers:
        factor = alpha * factors.get(layer, 1.0)
        paths = _writers_of(weights, layer, int(rows.shape[1]))
        for path in paths:
            weight = _float_weight(weights, path, int(rows.shape[1]))
            done = cut_matrix(weight, rows, factor, mode)
            if mode == "row":
                shares.append(share_left(done, weight, rows))
            cutting[f"{path}.weight"] = done.astype(weight.dtype)
            for packed in ("scales", "biases"):
                cutting.pop(f"{path}.{packed}", None)
            bias = weights.get(f"{path}.bias")
            if bias is not None:
                cutting[f"{path}.bias"] = remove_from_bias(bias, rows, factor).astype(bias.dtype)
    if mode == "row":
        warnings.warn(
            f"row norm preservation puts back up to {largest(shares):.1%} of the direction; "
            "norm_preserve='column' keeps the norms of the columns and leaves none",
            VaubanWarning,
            stacklevel=2,
        )
    return cutting


def _check_dictionary(weights: Any) -> None:
    if not isinstance(weights, Mapping):
        raise InputError(
            f"weights is a {type(weights).__name__}; expected a flat dictionary of mlx arrays: "
            "dict(tree_flatten(model.parameters()))"
        )
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, mx.array):
            raise InputError(
                f"weights[{name!r}] is a {type(value).__name__}; expected an mlx array under a "
                "flat name: dict(tree_flatten(model.parameters()))"
            )


def _refuse_post_norms(weights: Weights) -> None:
    for name in weights:
        if any(part in _POST_NORMS for part in name.split(".")):
            raise InputError(
                f"{name}: a norm stands between the writers and the residual stream, so a cut "
                "along the plain direction would leak; use plan_cut(model, direction), which "
                "corrects for its gain"
            )


def _writers_of(weights: Weights, layer: int, size: int) -> list[str]:
    """Paths of the matrices of one block that write to a stream of `size` components.

    Raises InputError for a direction of another size, and for a block, or a part of it with
    matrices of its own (its attention, its MLP), in which no writer is recognised.
    """
    paths: list[str] = []
    other_sizes: list[str] = []
    has_writer: dict[str, bool] = {}
    for name, value in weights.items():
        match = _BLOCK.match(name)
        if not match or int(match["index"]) != layer or value.ndim < 2:
            continue
        path, inside = name.removesuffix(".weight"), match["inside"].removesuffix(".weight")
        if path == name:
            continue
        part, _, below = inside.partition(".")
        named = inside.split(".")[-1] in WRITER_NAMES or inside in _MORE_WRITERS
        writes = named and value.shape[-2] == size
        if writes:
            paths.append(path)
        elif named:
            other_sizes.append(f"{path} writes {value.shape[-2]}")
        if below:
            has_writer[part] = has_writer.get(part, False) or writes
    if not paths and other_sizes:
        raise InputError(f"the direction has {size} components, but {other_sizes[0]}")
    missing = [part for part, writes in has_writer.items() if not writes]
    if missing or not paths:
        where = f"{missing[0]} of block {layer}" if paths else f"block {layer}"
        raise InputError(
            f"{where} has no residual writer among its parameters; the direction would stay in. "
            "Names end in o_proj, down_proj, ... (vauban.models.WRITER_NAMES); "
            "plan_cut(model, direction) sees the modules themselves"
        )
    return paths


def _float_weight(weights: Weights, path: str, size: int) -> mx.array:
    weight = weights[f"{path}.weight"]
    foreign = next((n for n in _OWN_PACKING if f"{path}.{n}" in weights), None)
    if foreign is not None:
        raise InputError(
            f"{path}.{foreign} belongs to a packing that mlx does not know; use "
            "plan_cut(model, direction), which sees the module"
        )
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
    mode = _FLOAT_PACKINGS.get((bits, group))
    if mode is None:
        raise _unreadable(path)
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
        sibling_scales = weights.get(f"{parent}.{name}.scales")
        # A float sibling says how many rows it has, not that they are the writer's inputs.
        certain = sibling_scales is not None and size / sibling_scales.shape[-1] == group
        if certain and bits in (2, 3, 4, 5, 6, 8) and group in (16, 32, 64, 128):
            return int(bits), int(group)
    raise _unreadable(path)


def _unreadable(path: str) -> InputError:
    return InputError(
        f"the packing of {path} cannot be read from the dictionary alone; use "
        "plan_cut(model, direction), which knows each module's bits and group size"
    )
