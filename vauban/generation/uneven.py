"""Whether prompts of uneven length may share a batch on a model, and join one later, by trying it.

Knows probe tokens and caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vauban._common import probe_tokens
from vauban.generation.batching import Batch, prefix_cache
from vauban.generation.decoding import batch_cache, prefill
from vauban.models.anatomy import anatomy
from vauban.models.caches import join_rows, keep_rows
from vauban.models.forward import BatchCheck, can_share
from vauban.models.notes import note, notes
from vauban.models.parity import relative_difference, tolerance_for


def uneven_batches(model: nn.Module) -> BatchCheck:
    """Try two prompts of different length together and alone, prefill and two decoded tokens.

    mlx-lm's batched caches are right on most families, not on all; this decides it by running
    them. Once per loaded model.
    """
    known = notes(model).batches
    if known is not None:
        return known
    check = _tried(model, "uneven batches", _together)
    note(model, batches=check)
    return check


def rows_can_join(model: nn.Module) -> BatchCheck:
    """The same for a prompt that joins another, which is being answered, as a third leaves.

    Once per loaded model; not where `uneven_batches` is not right.
    """
    known = notes(model).joins
    if known is not None:
        return known
    check = uneven_batches(model)
    if check.ok:
        check = _tried(model, "rows that join a batch", _relieved)
    note(model, joins=check)
    return check


_PROBES = (11, 6)
_SAID = (1, 3)


def _tried(
    model: nn.Module,
    what: str,
    several: Callable[[nn.Module, list[list[int]], list[Any] | None], mx.array],
) -> BatchCheck:
    """Whether `several` has two prompts end in the logits that each has alone."""
    top = anatomy(model).vocabulary
    lists = [probe_tokens(n, top, i) for i, n in enumerate(_PROBES)]
    for head in [[], probe_tokens(5, top, 2)] if can_share(model) else [[]]:
        try:
            found = several(model, lists, prefix_cache(model, head, ()))
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            return BatchCheck(False, f"{what} fail: {type(error).__name__}: {error}")
        alone = [_together(model, [head + tokens], None, row) for row, tokens in enumerate(lists)]
        single = mx.concatenate(alone)
        difference = relative_difference(found, single)
        if not difference <= tolerance_for(single.dtype in (mx.float16, mx.bfloat16)):
            return BatchCheck(False, f"{what} differ from single prompts by {difference:.1e}")
    return BatchCheck(True, "")


def _together(
    model: nn.Module, lists: list[list[int]], prefix: list[Any] | None, first: int = 0
) -> mx.array:
    """(B, 3, V) logits behind each row and behind two fixed tokens after it."""
    cache, logits = _read(model, lists, prefix)
    steps = [logits]
    for said in range(len(_SAID)):
        steps.append(_said(model, cache, [(row + first, said) for row in range(len(lists))]))
    out = mx.stack(steps, axis=1)
    mx.eval(out)
    return out


def _relieved(model: nn.Module, lists: list[list[int]], prefix: list[Any] | None) -> mx.array:
    """The same figures; the first prompt joins the second, which is a token ahead, as it leaves
    another behind, and goes on alone."""
    second, other = lists[1], [*lists[0], *lists[1]]
    cache, logits = _read(model, [other, second], prefix, joinable=True)
    late = [logits[1:], _said(model, cache, [(0, 0), (1, 0)])[1:]]
    keep_rows(cache, mx.array([1]), 2)
    more, logits = _read(model, lists[:1], prefix, joinable=True)
    early = [logits]
    join_rows(cache, more)
    both = _said(model, cache, [(1, 1), (0, 0)])
    late.append(both[:1])
    early.append(both[1:])
    keep_rows(cache, mx.array([1]), 2)
    early.append(_said(model, cache, [(0, 1)]))
    out = mx.stack([mx.concatenate(early), mx.concatenate(late)])
    mx.eval(out)
    return out


def _read(
    model: nn.Module, lists: list[list[int]], prefix: list[Any] | None, joinable: bool = False
) -> tuple[list[Any], mx.array]:
    """The caches of a batch behind its prompts, and the logits there."""
    widths = [len(tokens) for tokens in lists]
    padded = [tokens + [0] * (max(widths) - len(tokens)) for tokens in lists]
    batch = Batch(list(range(len(lists))), mx.array(padded), widths)
    cache = batch_cache(model, [prefix], batch, joinable=joinable)
    return cache, prefill(model, batch, cache)


def _said(model: nn.Module, cache: list[Any], rows: list[tuple[int, int]]) -> mx.array:
    """(B, V) logits behind one more token of each row: (prompt, how many it has said)."""
    tokens = mx.array([[_SAID[said] + prompt] for prompt, said in rows])
    return model(tokens, cache=cache)[:, -1]
