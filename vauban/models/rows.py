"""What the rows of a batch may share on a model: a common prefix's cache, padding on the right.

Tried on the model at hand, once, because it depends on what a family keeps in its caches and how
its blocks read them. Knows the forward pass; batches nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from vauban.errors import ArchitectureError
from vauban.models.anatomy import anatomy
from vauban.models.caches import repeated
from vauban.models.notes import note, notes
from vauban.models.passes import forward_pass


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
    known = notes(model).rows
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
            cache = _after(model, start[:skip])
            got = _ends(model, padded, [len(row) for row in rows], cache)
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, ArchitectureError):
            # Whatever a family cannot do with a batch, it is not asked to do.
            return float("inf")
        return max(relative_difference(got[0], together), relative_difference(got[1], logits))

    half = together.dtype in (mx.float16, mx.bfloat16)
    found = RowChecks(difference(13), difference(0), 2e-2 if half else 1e-4)
    note(model, rows=found)
    return found


def _after(model: nn.Module, prefix: list[int]) -> list[Any] | None:
    """The cache of `prefix` for two rows, None for an empty one."""
    if not prefix:
        return None
    cache = make_prompt_cache(model)
    forward_pass(model, mx.array([prefix]), cache=cache, positions=None, logits=False)
    return repeated(cache, 2)


def _ends(
    model: nn.Module, rows: list[list[int]], lengths: list[int], cache: list[Any] | None
) -> tuple[mx.array, mx.array]:
    """Residuals and logits of each row's last token."""
    out = forward_pass(model, mx.array(rows), lengths=lengths, cache=cache, logits="last")
    assert out.residual is not None and out.logits is not None
    mx.eval(out.residual, out.logits)
    return out.residual, out.logits


def relative_difference(a: mx.array, b: mx.array) -> float:
    """Largest |a - b| relative to the largest |b|; entries ruled out as -inf in both count as 0."""
    a, b = (mx.where(x == -mx.inf, 0, x).astype(mx.float32) for x in (a, b))
    return float(mx.abs(a - b).max() / mx.maximum(mx.abs(b).max(), 1e-6))
