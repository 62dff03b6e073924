"""Right-padded, length-sorted batches over a shared prefix that is computed once.

Knows token lists and mlx-lm's caches; knows no prompts and no templates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from vauban.errors import ArchitectureError, InputError
from vauban.interventions import Intervention
from vauban.models import caches
from vauban.models.anatomy import anatomy
from vauban.models.forward import forward

# Tokens a batch may hold; keeps a batch of long prompts within a few hundred MB of activations.
TOKEN_BUDGET = 4096


@dataclass(frozen=True, eq=False)
class Batch:
    """`rows` indexes the caller's list; tokens (B, T) are right-padded with 0."""

    rows: list[int]
    tokens: mx.array
    lengths: list[int]


def shared_prefix(token_lists: Sequence[Sequence[int]], keep: int = 1) -> int:
    """Length of the common start of all lists, leaving at least `keep` own tokens to each."""
    lists = [list(t) for t in token_lists]
    shortest, longest = min(lists), max(lists)
    limit = min(len(t) for t in token_lists) - keep
    # The lexicographically smallest and largest list differ wherever any two do.
    for i, (a, b) in enumerate(zip(shortest, longest, strict=False)):
        if a != b or i >= limit:
            return max(0, min(i, limit))
    return max(0, limit)


def batches(
    token_lists: Sequence[Sequence[int]],
    *,
    skip: int = 0,
    batch_size: int | None = None,
    equal_lengths: bool = False,
) -> Iterator[Batch]:
    """Batches of similar length, longest first (so that memory peaks at once), `skip` tokens off.

    Order does not matter to the result; the rows say where each one belongs.
    """
    if any(len(t) == 0 for t in token_lists):
        empty = next(i for i, t in enumerate(token_lists) if not t)
        raise InputError(f"prompt {empty} has no tokens")
    order = sorted(range(len(token_lists)), key=lambda i: -len(token_lists[i]))
    start = 0
    while start < len(order):
        width = len(token_lists[order[start]]) - skip
        size = batch_size or max(1, min(64, TOKEN_BUDGET // max(width, 1)))
        rows = order[start : start + size]
        if equal_lengths:
            rows = [i for i in rows if len(token_lists[i]) - skip == width]
        lengths = [len(token_lists[i]) - skip for i in rows]
        tokens = [
            list(token_lists[i][skip:]) + [0] * (width - n)
            for i, n in zip(rows, lengths, strict=True)
        ]
        yield Batch(rows, mx.array(tokens), lengths)
        start += len(rows)


@dataclass(frozen=True)
class RowChecks:
    """What a model's rows may share, measured: the cache of a common prefix, a padded batch.

    The figures are the largest difference from single prompts, relative to the largest value; inf
    where it fails outright.
    """

    prefix: float
    padding: float
    tolerance: float

    @property
    def shares(self) -> bool:
        return self.prefix <= self.tolerance

    @property
    def pads(self) -> bool:
        return self.padding <= self.tolerance


def can_share(model: nn.Module) -> bool:
    """Whether the cache of a common prefix may be repeated over a batch; tried once per model."""
    return row_checks(model).shares


def can_pad(model: nn.Module) -> bool:
    """Whether shorter prompts may be padded on the right; tried once per model."""
    return row_checks(model).pads


def row_checks(model: nn.Module) -> RowChecks:
    """Try two prompts with a common start together and alone: residuals and logits of their ends.

    Whether a cache may be repeated over rows depends on what a family keeps in it and how its
    blocks read it, so it is run, not guessed.
    """
    known = getattr(model, "_vauban_rows", None)
    if known is not None:
        return known
    top = min(anatomy(model).vocabulary, 50_000)
    start = [(i * 7919 + 13) % top for i in range(13)]
    ends = [[(i * 104729 + 5) % top for i in range(9)], [(i * 31337 + 7) % top for i in range(4)]]
    alone = [_ends(model, [start + end], [13 + len(end)], None) for end in ends]
    together = mx.concatenate([values for values, _ in alone])
    logits = mx.concatenate([values for _, values in alone])

    def difference(skip: int) -> float:
        rows = [(start + end)[skip:] for end in ends]
        padded = [row + [0] * (len(rows[0]) - len(row)) for row in rows]
        try:
            cache = repeated(prefix_cache(model, start[:skip], ()), 2)
            got = _ends(model, padded, [len(row) for row in rows], cache)
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, ArchitectureError):
            # Whatever a family cannot do with a batch, it is not asked to do.
            return float("inf")
        return max(_relative(got[0], together), _relative(got[1], logits))

    half = together.dtype in (mx.float16, mx.bfloat16)
    found = RowChecks(difference(13), difference(0), 2e-2 if half else 1e-4)
    object.__setattr__(model, "_vauban_rows", found)
    return found


def _ends(
    model: nn.Module, rows: list[list[int]], lengths: list[int], cache: list[Any] | None
) -> tuple[mx.array, mx.array]:
    """Residuals and logits of each row's last token."""
    out = forward(model, mx.array(rows), lengths=lengths, cache=cache, logits="last")
    assert out.residual is not None and out.logits is not None
    mx.eval(out.residual, out.logits)
    return out.residual, out.logits


def _relative(a: mx.array, b: mx.array) -> float:
    a, b = (mx.where(mx.isfinite(x), x, 0).astype(mx.float32) for x in (a, b))
    return float(mx.abs(a - b).max() / mx.maximum(mx.abs(b).max(), 1e-6))


def prefix_cache(
    model: nn.Module, prefix: Sequence[int], interventions: Sequence[Intervention]
) -> list[Any] | None:
    """The cache after reading `prefix` once under `interventions`; None for an empty prefix."""
    if not prefix:
        return None
    cache = make_prompt_cache(model)
    forward(
        model,
        mx.array([list(prefix)]),
        cache=cache,
        positions=None,
        interventions=interventions,
        logits=False,
    )
    mx.eval([c.state for c in cache])
    return cache


def repeated(cache: list[Any] | None, rows: int) -> list[Any] | None:
    """A copy of the cache of one prompt for `rows` rows; the original stays as it is."""
    return None if cache is None else caches.repeated(cache, rows)
