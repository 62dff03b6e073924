"""Where the parts of an mlx-lm model are: trunk, embedding, blocks, final norm, head, block terms.

Rules over the module tree, no family names. Knows modules; runs nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vauban.errors import ArchitectureError, InputError
from vauban.models.notes import note, notes

_EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
_NORM_NAMES = (
    *("norm", "final_layernorm", "final_layer_norm", "final_norm", "ln_f", "norm_f"),
    *("embedding_norm", "output_norm"),
)
_HEAD_NAMES = ("lm_head", "output", "embed_out")
_POSITIONS = re.compile(r"wpe|position|type_embed")
_POST_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_mlp_norm")


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts that a forward pass needs; paths as in `model.named_modules()`.

    `trunk` embeds the tokens and runs the blocks. `head_path` is None where the embedding's matrix
    is the head (`tied`), or where the head is a bare array.
    """

    trunk: nn.Module
    embedding_path: str
    embedding: nn.Module
    layers: tuple[nn.Module, ...]
    layer_paths: tuple[str, ...]
    norm: nn.Module | None
    head_path: str | None
    d_model: int
    vocabulary: int
    tied: bool

    @property
    def n_layers(self) -> int:
        return len(self.layers)


@dataclass(frozen=True, eq=False)
class Branch:
    """A term that a block adds to the stream, and the module that puts it out.

    The stream gets `multiplier` times that output (Granite, MiniCPM).
    """

    layer: int
    site: str
    path: str
    module: nn.Module
    multiplier: float


def embedding_size(embedding: nn.Module) -> tuple[int, int]:
    """(vocabulary, d) of a plain or packed embedding."""
    rows, columns = embedding.weight.shape
    return int(rows), int(columns * 32 // embedding.bits if "scales" in embedding else columns)


def check_same_vocabulary(original: nn.Module, modified: nn.Module, what: str) -> None:
    """InputError where two models that `what` compares have vocabularies of different sizes."""
    a, b = anatomy(original).vocabulary, anatomy(modified).vocabulary
    if a != b:
        raise InputError(
            f"{what} compares models of one vocabulary, token by token; the original has {a} "
            f"tokens, the modified one {b}"
        )


def anatomy(model: nn.Module) -> Anatomy:
    """The parts of `model`; ArchitectureError when it has no embedding or no blocks."""
    known = notes(model).anatomy
    if known is not None and known.embedding is _by_path(model, known.embedding_path):
        return known
    layers = tuple(getattr(model, "layers", None) or ())
    if not layers:
        raise ArchitectureError(
            f"{type(model).__name__} has no `layers`: it is not a language model of mlx-lm"
        )
    paths = {id(module): path for path, module in model.named_modules()}
    missing = [i for i, layer in enumerate(layers) if id(layer) not in paths]
    if missing:
        raise ArchitectureError(
            f"{type(model).__name__}: blocks {missing[:3]} are in `layers` but not in the tree"
        )
    trunk_path, trunk, embedding_name = _trunk(model, layers, paths[id(layers[0])])
    prefix = f"{trunk_path}." if trunk_path else ""
    embedding = _by_path(trunk, embedding_name)
    vocabulary, d_model = embedding_size(embedding)
    norm = next((trunk[n] for n in _NORM_NAMES if isinstance(trunk.get(n), nn.Module)), None)
    head = _head_path(model, layers, vocabulary)
    parts = Anatomy(
        trunk=trunk,
        embedding_path=f"{prefix}{embedding_name}",
        embedding=embedding,
        layers=layers,
        layer_paths=tuple(paths[id(layer)] for layer in layers),
        norm=norm,
        head_path=head,
        d_model=d_model,
        vocabulary=vocabulary,
        tied=head is None and not isinstance(model.get("lm_head"), mx.array),
    )
    note(model, anatomy=parts)
    return parts


def _head_path(model: nn.Module, layers: tuple[nn.Module, ...], vocabulary: int) -> str | None:
    """The path of the head, None where the embedding's matrix serves as one."""
    inside = inside_blocks(layers)
    for name in _HEAD_NAMES:
        for path, module in model.named_modules():
            if path.split(".")[-1] != name or id(module) in inside:
                continue
            # A head of another name is known by its rows, one a token.
            weight = module.get("weight")
            if name == "lm_head" or (weight is not None and weight.shape[0] == vocabulary):
                return path
    return None


def _by_path(model: nn.Module, path: str) -> Any:
    node: Any = model
    for part in path.split("."):
        try:
            node = node[int(part)] if part.isdigit() else node[part]
        except (KeyError, IndexError, TypeError):
            return None
    return node


def is_embedding(module: nn.Module) -> bool:
    """Whether a module is a table of rows by token: mlx's classes, or one that can be a head."""
    return isinstance(module, _EMBEDDINGS) or (
        hasattr(type(module), "as_linear") and "weight" in module
    )


def _trunk(
    model: nn.Module, layers: tuple[nn.Module, ...], layer_path: str
) -> tuple[str, nn.Module, str]:
    """The innermost module with both the blocks and a text embedding: path, module, table's path.

    The text's embedding is the one with the largest vocabulary, position tables aside. A child of
    the module comes before what lies deeper.
    """
    inside = inside_blocks(layers)
    parts = layer_path.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        path = ".".join(parts[:depth])
        module = _by_path(model, path) if path else model
        if not isinstance(module, nn.Module):
            continue
        below = [
            name
            for name, child in module.named_modules()
            if name and is_embedding(child) and id(child) not in inside
        ]
        children = [n for n in module if n in below]
        names = children or [n for n in below if not any(p.isdigit() for p in n.split("."))]
        names = [n for n in names if not _POSITIONS.search(n)] or names
        if names:
            return path, module, max(names, key=lambda n: embedding_size(_by_path(module, n))[0])
    raise ArchitectureError(
        f"{type(model).__name__}: no module owns both an embedding and the list of blocks"
    )


def inside_blocks(layers: tuple[nn.Module, ...]) -> set[int]:
    """The identities of all modules in the blocks."""
    return {id(module) for layer in layers for _, module in layer.named_modules()}


def is_half(parts: Anatomy) -> bool:
    """Whether the stream is carried in half precision."""
    return any(p.dtype in (mx.float16, mx.bfloat16) for p in parts.embedding.parameters().values())


def position_tables(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Learned position embeddings of the trunk as wide as the stream, by path."""
    parts = anatomy(model)
    inside = inside_blocks(parts.layers)
    return [
        (path, module)
        for path, module in model.named_modules()
        if is_embedding(module)
        and id(module) not in inside
        and _POSITIONS.search(path)
        and embedding_size(module)[1] == parts.d_model
        and module is not parts.embedding
    ]


def post_norms(layer: nn.Module) -> dict[str, str]:
    """The norm that stands last between a term and the stream, by "attention" and "mlp".

    The name `post_attention_layernorm` does not say which one: in Llama it precedes the MLP, in
    Gemma 2/3, OLMo 2/3 and EXAONE 4 it follows the attention. It follows the attention where the
    MLP has a post-norm too and the block has no `post_self_attn_layernorm` (GLM-4).
    """
    norms: dict[str, str] = {}
    mlp = next((name for name in _POST_MLP if name in layer), None)
    if mlp:
        norms["mlp"] = mlp
    for name in ("post_self_attn_layernorm", "post_mixer_norm"):
        if name in layer:
            norms["attention"] = name
    if mlp and "attention" not in norms and "post_attention_layernorm" in layer:
        norms["attention"] = "post_attention_layernorm"
    return norms


def multiplier(layer: nn.Module) -> float:
    """The scalar between a block's terms and the stream; 1.0 without one."""
    if isinstance(getattr(layer, "residual_multiplier", None), int | float):
        return float(layer.residual_multiplier)
    depth, blocks = getattr(layer, "scale_depth", None), getattr(layer, "num_hidden_layers", None)
    if isinstance(depth, int | float) and isinstance(blocks, int):
        return float(depth) / blocks**0.5
    return 1.0
