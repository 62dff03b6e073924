"""Whether prompts of uneven length may share a batch on a model, by trying it.

Knows probe tokens and caches.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vauban._common import probe_tokens
from vauban.generation.batching import Batch, prefix_cache
from vauban.generation.decoding import batch_cache, prefill
from vauban.models.anatomy import anatomy
from vauban.models.forward import BatchCheck, can_share
from vauban.models.notes import note, notes
from vauban.models.parity import relative_difference, tolerance_for


def uneven_batches(model: nn.Module) -> BatchCheck:
    """Try two prompts of different length together and alone, prefill and one decoded token.

    mlx-lm's batched caches are right on most families, not on all; this decides it by running
    them. Once per loaded model.
    """
    known = notes(model).batches
    if known is not None:
        return known
    check = _try_uneven(model)
    note(model, batches=check)
    return check


def _try_uneven(model: nn.Module) -> BatchCheck:
    top = anatomy(model).vocabulary
    lists = [probe_tokens(11, top), probe_tokens(6, top, 1)]
    for head in [[], probe_tokens(5, top, 2)] if can_share(model) else [[]]:
        try:
            together = _decoded(model, lists, prefix_cache(model, head, ()))
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            return BatchCheck(False, f"batching fails: {type(error).__name__}: {error}")
        alone = [_decoded(model, [head + tokens], None, row) for row, tokens in enumerate(lists)]
        single = mx.concatenate(alone)
        difference = relative_difference(together, single)
        if not difference <= tolerance_for(single.dtype in (mx.float16, mx.bfloat16)):
            return BatchCheck(
                False, f"uneven batches differ from single prompts by {difference:.1e}"
            )
    return BatchCheck(True, "")


def _decoded(
    model: nn.Module, lists: list[list[int]], prefix: list[Any] | None, first: int = 0
) -> mx.array:
    """(B, 3, V) logits behind each row and behind two fixed tokens after it."""
    widths = [len(tokens) for tokens in lists]
    padded = [tokens + [0] * (max(widths) - len(tokens)) for tokens in lists]
    batch = Batch(list(range(len(lists))), mx.array(padded), widths)
    cache = batch_cache(model, [prefix], batch)
    steps = [prefill(model, batch, cache)]
    for token in (1, 3):
        following = mx.array([[token + first + row] for row in batch.rows])
        steps.append(model(following, cache=cache)[:, -1])
    out = mx.stack(steps, axis=1)
    mx.eval(out)
    return out
