"""The exceptions to the rules, family by family: an entry is one line or one short function.

A family is named by its mlx-lm model file. All others are covered by the rules of `anatomy`, `walk`
and `writers`, and `verify_forward` proves them on the model that was loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask

# Called with the stream and the number of a residual; returns the stream after interventions.
Visit = Callable[[mx.array, int], mx.array]
# (model, tokens, cache, visit) -> the stream behind the final norm.
Loop = Callable[[nn.Module, mx.array, list[Any], Visit], mx.array]


def family_of(model: nn.Module) -> str:
    """The name of the mlx-lm model file that defines this model."""
    return type(model).__module__.rsplit(".", 1)[-1]


def _afm7(model: Any, tokens: mx.array, cache: list[Any], visit: Visit) -> mx.array:
    """The last blocks read the keys and values that the block before them has cached."""
    trunk = model.model
    h = trunk.embedding(tokens)
    mask = create_attention_mask(h, cache[0])
    for i, (layer, state) in enumerate(zip(trunk.layers, cache, strict=True)):
        h = layer(visit(h, i), mask, cache=state)
    # Not `keys_and_values()`, which mlx-lm 0.31 does not have.
    keys, values = (a[..., : cache[-1].offset, :] for a in (cache[-1].keys, cache[-1].values))
    for i, layer in enumerate(trunk.kv_reuse_layers, len(trunk.layers)):
        h = layer(visit(h, i), keys, values, mask)
    return trunk.output_norm(visit(h, len(model.layers)))


def _nanbeige(model: Any, tokens: mx.array, cache: list[Any], visit: Visit) -> mx.array:
    """The blocks run several times, each round with its own caches, a norm between rounds."""
    trunk, n = model.model, len(model.layers)
    h = trunk.embed_tokens(tokens)
    mask = create_attention_mask(h, cache[0])
    for start in range(0, trunk.num_loops * n, n):
        for i, layer in enumerate(trunk.layers):
            h = layer(visit(h, i), mask, cache[start + i])
        h = visit(h, n)
        if not trunk.skip_loop_final_norm:
            h = trunk.norm(h)
    return trunk.norm(h) if trunk.skip_loop_final_norm else h


def _iquestloopcoder(model: Any, tokens: mx.array, cache: list[Any], visit: Visit) -> mx.array:
    """Two rounds over parts of the blocks; the second mixes the first one's keys with a window."""
    trunk, n = model.model, len(model.layers)
    h = trunk.embed_tokens(tokens)
    mask = create_attention_mask(h, cache[0])
    window = create_attention_mask(h, cache[n], window_size=trunk.loop_window_size)
    first: list[tuple[mx.array, mx.array]] = []
    for round_ in (0, 1):
        for i, layer in enumerate(trunk.layers):
            h, attention, state = visit(h, i), layer.self_attn, cache[round_ * n + i]
            queries, keys, values = attention.get_qkv(layer.input_layernorm(h), state.offset)
            if round_:
                gate = trunk.gate_projections[i](queries)
                wide = attention.attention(queries, *first[i], mask, cache=state)
            keys, values = state.update_and_fetch(keys, values)
            out = attention.attention(queries, keys, values, window if round_ else mask, state)
            if round_:
                out = gate * wide + (1 - gate) * out
            else:
                first.append((keys, values))
            h = h + attention.o_proj(out.transpose(0, 2, 1, 3).reshape(*tokens.shape, -1))
            h = h + layer.mlp(layer.post_attention_layernorm(h))
        h = visit(h, n)
    return trunk.norm(h)


LOOPS: dict[str, Loop] = {
    "afm7": _afm7,
    "iquestloopcoder": _iquestloopcoder,
    "nanbeige": _nanbeige,
}

# The trunk reads these blocks' parts and never calls the blocks: nothing can be put between them.
BLOCKS_NOT_CALLED = frozenset({"iquestloopcoder"})

# Blocks that hand on one array, which is not what the next block's norm reads.
READ_BY_NORM = frozenset({"kimi_k3"})

# Names of writers that are something else in other families.
MORE_WRITERS: dict[str, frozenset[str]] = {
    "rwkv7": frozenset({"value"}),
    "nemotron-nas": frozenset({"linear"}),
}

# Modules with a writer's name that put nothing into the stream, by path below the block.
NOT_WRITERS: dict[str, frozenset[str]] = {"muse_spark": frozenset({"mlp.experts.down_proj"})}

# Writers outside the blocks, by path below the trunk: they build the stream with the embedding.
BEFORE_BLOCKS: dict[str, str] = {"longcat_flash_ngram": "ngram_embeddings.post_projs."}


# The module that puts a whole term out, where it is neither the writer's parent nor a norm.
TERMS: dict[str, dict[str, str]] = {"talkie": {"attention": "attn_gain", "mlp": "mlp_gain"}}


def no_operation(family: str, layer: Any) -> bool:
    """Whether a block is known to add nothing to the stream (Nemotron-NAS prunes whole blocks)."""
    return family == "nemotron-nas" and layer.attention_config.no_op and layer.ffn_config.no_op


# Matrices packed in a way that mlx does not know, by class.
OWN_PACKING: dict[str, str] = {
    "BitLinear": "ternary",
    "HadamardQuantizedEmbedding": "hadamard",
    "HadamardQuantizedLinear": "hadamard",
}


def own_packing(module: nn.Module) -> str | None:
    """The packing of a module that mlx does not know, also while its class is swapped."""
    names = (cls.__name__ for cls in type(module).__mro__)
    return next((OWN_PACKING[name] for name in names if name in OWN_PACKING), None)


# Why an exact cut is out of reach, where the measured leak is not rounding.
NOT_CUTTABLE: dict[str, str] = {
    "gemma3n": "LAuReL adds the normed stream itself",
    "longcat_flash": "identity experts add the normed stream itself",
    "longcat_flash_ngram": "identity experts add the normed stream itself",
    "nanbeige": "a norm stands between two rounds over the blocks unless skip_loop_final_norm",
    "rwkv7": "the first block puts a norm with a bias between the embedding and the stream",
    "prism_hadamard_qwen35": "the embedding is read in half precision, from a rotated basis",
    "muse_spark": "each channel of the stream has its own skip gain",
}
