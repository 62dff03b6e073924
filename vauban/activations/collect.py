"""Collect residuals at chosen prompt positions: every layer, right-padded batches, one prefix pass.

Knows prompts and the forward pass; computes no direction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban._common import Progress
from vauban.errors import InputError
from vauban.generation import Batches, prefix_cache, repeated, shared_prefix, token_budget
from vauban.interventions import Intervention, shares_prefix
from vauban.models import can_pad, can_share, forward
from vauban.prompts import encode_chat


@dataclass(frozen=True, eq=False)
class Activations:
    """values (n, L+1, P, d) float32, in the order of the prompts; residual index on axis 1.

    `positions` are negative, counted from each prompt's last token.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> acts = vauban.collect_activations(model, tokenizer, ["Say hello.", "Name a colour."])
    >>> acts.values.shape, acts.at(4, -1).shape
    ((2, 7, 1, 128), (2, 128))
    """

    values: mx.array
    positions: tuple[int, ...]

    def at(self, residual: int, position: int = -1) -> mx.array:
        """(n, d) of one residual and position."""
        if position not in self.positions:
            raise InputError(f"position {position} was not collected; there are {self.positions}")
        return self.values[:, residual, self.positions.index(position)]

    def summary(self) -> str:
        n, layers, _, d = self.values.shape
        return f"{n} prompts x {layers} residuals x {len(self.positions)} positions x {d}"

    def to_dict(self) -> dict[str, Any]:
        return {"shape": list(self.values.shape), "positions": list(self.positions)}


def stream_activations(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    positions: Sequence[int] = (-1,),
    interventions: Iterable[Intervention] = (),
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[list[int], mx.array]]:
    """Yield (rows, values (B, L+1, P, d) float32) batch by batch; rows index `prompts`.

    The prefix that all prompts share (a chat template's head) is read once and its cache reused.
    Raises InputError for no prompts, empty prompts or a position beyond a prompt, and
    `InputError` naming the prompt when an activation is NaN or inf.
    """
    if not prompts:
        raise InputError("the prompt set is empty; expected at least one prompt")
    wanted = tuple(int(p) for p in positions)
    interventions = tuple(interventions)
    tokens = [encode_chat(tokenizer, prompt) for prompt in prompts]
    short = [i for i, t in enumerate(tokens) if len(t) < -min(wanted, default=-1)]
    if short:
        raise InputError(
            f"prompt {short[0]} has {len(tokens[short[0]])} tokens; position {min(wanted)} "
            "lies before its start"
        )
    skip = 0
    if len(tokens) > 1 and can_share(model) and shares_prefix(interventions):
        skip = shared_prefix(tokens, keep=-min(wanted))
    prefix = prefix_cache(model, tokens[0][:skip], interventions)
    done = 0
    even = len({len(t) for t in tokens}) > 1 and not can_pad(model)
    for batch in Batches(
        tokens,
        skip=skip,
        batch_size=batch_size,
        equal_lengths=even,
        budget=token_budget(model),
        tight=True,
    ):
        out = forward(
            model,
            batch.tokens,
            lengths=batch.lengths,
            cache=repeated(prefix, len(batch.rows)),
            positions=wanted,
            interventions=interventions,
            logits=False,
        )
        assert out.residual is not None
        values = out.residual.astype(mx.float32)
        finite = mx.isfinite(values).all(axis=(1, 2, 3))
        mx.eval(values, finite)
        if not bool(finite.all()):
            row = batch.rows[int(mx.argmin(finite))]
            raise InputError(
                f"the activations of prompt {row} hold NaN or inf; the model overflows in "
                f"{out.residual.dtype}: load it in float32 or bfloat16"
            )
        yield batch.rows, values
        done += len(batch.rows)
        if progress:
            progress("collect", done, len(tokens))


def collect_activations(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    positions: Sequence[int] = (-1,),
    interventions: Iterable[Intervention] = (),
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Activations:
    """Residuals of all prompts at `positions`: values (n, L+1, P, d) float32.

    Raises InputError for no prompts, a position before a prompt's start, and NaN or inf.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> found = vauban.collect_activations(model, tokenizer, ["Hello", "Good morning"])
    >>> found.values.shape[:3] == (2, len(model.layers) + 1, 1)
    True
    """
    rows: list[int] = []
    parts: list[mx.array] = []
    for index, values in stream_activations(
        model,
        tokenizer,
        prompts,
        positions=positions,
        interventions=interventions,
        batch_size=batch_size,
        progress=progress,
    ):
        rows.extend(index)
        parts.append(values)
    order = mx.array(np.argsort(rows))
    values = mx.concatenate(parts)[order]
    mx.eval(values)
    return Activations(values, tuple(int(p) for p in positions))
