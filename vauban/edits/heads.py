"""The embedding and its head: what becomes of a shared matrix, and giving the head its own copy.

Knows mlx-lm classes and their switches; cuts nothing.
"""

from __future__ import annotations

import inspect
from typing import Literal

import mlx.nn as nn

from vauban.errors import InputError
from vauban.models import anatomy

EmbeddingMode = Literal["auto", "untie", "tied"] | bool


def has_untie_switch(model: nn.Module) -> bool:
    """Whether the class can carry its own head: `args.tie_word_embeddings` and an `lm_head`."""
    args = getattr(model, "args", None)
    return hasattr(args, "tie_word_embeddings") and "self.lm_head" in inspect.getsource(type(model))


def embedding_mode(
    model: nn.Module, embedding: EmbeddingMode, *, whole: bool
) -> Literal["cut", "untie", "tied", "kept"]:
    """What happens to the table: "cut", "untie", "tied" or "kept" (see `plan_cut`)."""
    if embedding not in ("auto", "untie", "tied", True, False):
        raise InputError(f"embedding is {embedding!r}; expected 'auto', 'untie', 'tied' or False")
    if embedding is False or (embedding == "auto" and not whole):
        return "kept"
    if not anatomy(model).tied:
        return "cut"
    if embedding == "tied":
        return "tied"
    if has_untie_switch(model):
        return "untie"
    if embedding == "untie":
        raise InputError(
            f"{type(model).__module__} has no switch to untie its head; use embedding='tied'"
        )
    return "tied"


def untie(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Give the head its own copy of the embedding matrix, in its own packing."""
    embedding = anatomy(model).embedding
    model.lm_head = head_from_embedding(embedding)
    model.args.tie_word_embeddings = False
    modules["lm_head"] = model.lm_head


def head_from_embedding(embedding: nn.Module) -> nn.Module:
    """A linear head that computes `embedding.as_linear`."""
    if isinstance(embedding, nn.QuantizedEmbedding):
        head = nn.QuantizedLinear(
            embedding.group_size,
            32,
            bias=False,
            group_size=embedding.group_size,
            bits=embedding.bits,
            mode=getattr(embedding, "mode", "affine"),
        )
        for name in ("weight", "scales", "biases"):
            if name in embedding:
                head[name] = embedding[name]
        return head
    plain = nn.Linear(1, 1, bias=False)
    plain.weight = embedding.weight
    return plain
