"""Directions at every residual and position, by every estimator, from one reading of the prompts.

A search takes its directions from here, also between two residuals. Knows activations; cuts
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vauban._common import Progress
from vauban.activations import ActivationMoments, stream_activations
from vauban.directions.candidates import Key
from vauban.directions.mean_estimators import estimator
from vauban.errors import InputError


@dataclass(frozen=True, eq=False)
class DirectionTable:
    """`raw` {estimator: (L+1, P, d)}, harmful minus harmless; `positions` (P,) negative."""

    raw: Mapping[str, mx.array]
    positions: tuple[int, ...]

    def candidates(self, method: str, residuals: tuple[float, float]) -> dict[Key, mx.array]:
        """{(position, residual): raw vector (d,)} of one estimator at whole residuals."""
        first, last = math.ceil(residuals[0]), math.floor(residuals[1])
        return {
            (position, residual): self.raw[method][residual, column]
            for column, position in enumerate(self.positions)
            for residual in range(first, last + 1)
        }

    def unit(self, method: str, position: int, residual: float) -> mx.array:
        """(d,) of norm 1; between two residuals both unit directions weighted by nearness.

        Unit directions, because raw differences grow with the residual's norm: the deeper one
        would rule. Raises InputError where the class means are equal.
        """
        below = math.floor(residual)
        share = residual - below
        column = self.positions.index(position)
        vector = self._row(method, below, column)
        if share:
            vector = (1 - share) * vector + share * self._row(method, below + 1, column)
        length = float(mx.linalg.norm(vector))
        if not length > 0:
            raise InputError(f"residual {residual}, position {position}: there is no direction")
        return vector / length

    def _row(self, method: str, residual: int, column: int) -> mx.array:
        raw = self.raw[method][residual, column]
        return raw / mx.maximum(mx.linalg.norm(raw), 1e-30)


def read_directions(
    model: nn.Module,
    tokenizer: Any,
    harmful: Sequence[Any],
    harmless: Sequence[Any],
    *,
    positions: Sequence[int],
    estimators: Sequence[str] = ("mean_difference",),
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> DirectionTable:
    """Read both classes once and estimate every direction.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> table = read_directions(model, tokenizer, ["Rob a shop."] * 2, ["Name a colour."] * 2,
    ...                         positions=(-1,))
    >>> round(float(mx.linalg.norm(table.unit("mean_difference", -1, 2.5))), 5)
    1.0
    """
    wanted = tuple(int(p) for p in positions)
    moments, done = [ActivationMoments(), ActivationMoments()], 0
    for part, prompts in zip(moments, (harmless, harmful), strict=True):
        for rows, values in stream_activations(
            model, tokenizer, prompts, positions=wanted, batch_size=batch_size
        ):
            part.update(values)
            done += len(rows)
            if progress:
                progress("measure", done, len(harmful) + len(harmless))
    raw = {name: estimator(name)(*moments) for name in estimators}
    mx.eval(raw)
    return DirectionTable(raw, wanted)
