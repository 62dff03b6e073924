"""Sliding windows: which blocks have one by the configuration, and which by the built model.

mlx-lm keeps a short cache for a block with a window. Some of its classes read no window at all;
they differ from the trained model only for texts that are longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from vauban.claims.rope import FULL, SLIDING
from vauban.errors import InputError

# Families whose transformers class gives every block the window where layer_types are not given.
_EVERY_BLOCK = ("mistral", "mixtral", "phi3", "phimoe", "starcoder2", "gemma2")


def missed_window(config: Mapping[str, Any], model: nn.Module, read: bool) -> int | None:
    """The window that the configuration gives to blocks and the model does not keep; None if met.

    `read` says whether the model's classes use the field. Raises InputError where a class that
    does gives windows to other blocks than `layer_types` names.
    """
    size = config.get("sliding_window")
    if not isinstance(size, int) or size <= 0 or config.get("use_sliding_window") is False:
        return None
    kinds = config.get("layer_types")
    kinds = kinds if isinstance(kinds, list) and {FULL, SLIDING} >= set(kinds) else None
    every = config["model_type"] in _EVERY_BLOCK
    asked = SLIDING in kinds if kinds else every or bool(config.get("use_sliding_window"))
    if not asked:
        return None
    limit = config.get("max_position_embeddings")
    if isinstance(limit, int) and limit <= size:
        return None
    if not read:
        return size
    caches = make_prompt_cache(model)
    built = [getattr(cache, "max_size", None) is not None for cache in caches]
    if kinds is None:
        return None if any(built) else size
    if any(built) and len(built) == len(kinds):
        wanted = [kind == SLIDING for kind in kinds]
        wrong = [i for i, (a, b) in enumerate(zip(built, wanted, strict=True)) if a != b]
        if wrong:
            raise InputError(
                f"layer_types of config.json make block {wrong[0]} {kinds[wrong[0]]}; mlx-lm's "
                f"{config['model_type']} builds it {'with' if built[wrong[0]] else 'without'} a "
                f"window of {size}"
            )
    return None
