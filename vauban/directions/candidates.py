"""Candidate directions: the raw mean difference at every position and residual.

Collects through `vauban.activations`; scores nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from vauban._common import Progress
from vauban.activations import ActivationMoments, stream_activations
from vauban.errors import InputError
from vauban.prompts import post_instruction_positions

Key = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Candidates:
    """`vectors` (R, P, d) raw differences, harmful - harmless, at residuals 0 to R-1.

    `positions` (P,) negative; `scales` (R, P) mean residual norm, against which a difference is
    zero or not.
    """

    vectors: mx.array
    positions: tuple[int, ...]
    scales: mx.array

    def table(self) -> dict[Key, mx.array]:
        """{(position, residual): vector (d,)}."""
        return {
            (position, residual): self.vectors[residual, column]
            for column, position in enumerate(self.positions)
            for residual in range(self.vectors.shape[0])
        }

    def summary(self) -> str:
        r, p, d = self.vectors.shape
        return f"{r * p} candidates: {r} residuals x {p} positions, d = {d}"

    def to_dict(self) -> dict[str, Any]:
        return {"shape": list(self.vectors.shape), "positions": list(self.positions)}


def collect_candidates(
    model: nn.Module,
    tokenizer: Any,
    harmful: Sequence[Any],
    harmless: Sequence[Any],
    *,
    positions: Sequence[int] | Literal["post_instruction"] = "post_instruction",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Candidates:
    """Mean differences at the input of every block, for all post-instruction positions.

    The output of the last block is no candidate (Arditi et al. 2024, section 2.3).

    Raises InputError for positions that are none, and where no prompt is given.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> found = collect_candidates(model, tokenizer, ["Rob a shop."], ["Name a colour."])
    >>> found.vectors.shape[0] == len(model.layers)
    True
    """
    if isinstance(positions, str):
        if positions != "post_instruction":
            raise InputError(f"positions is {positions!r}; expected 'post_instruction' or ints")
        positions = post_instruction_positions(tokenizer)
    wanted = tuple(int(p) for p in positions)
    moments, norms = [ActivationMoments(), ActivationMoments()], ActivationMoments()
    done = 0
    for part, prompts in zip(moments, (harmless, harmful), strict=True):
        for rows, values in stream_activations(
            model, tokenizer, prompts, positions=wanted, batch_size=batch_size
        ):
            part.update(values)
            done += len(rows)
            if progress:
                progress("candidates", done, len(harmful) + len(harmless))
            norms.update(mx.linalg.norm(values, axis=-1))
    difference = moments[1].mean - moments[0].mean
    return Candidates(difference[:-1], wanted, norms.mean[:-1])


def candidate_table(candidates: Any) -> dict[Key, mx.array]:
    """{(position, residual): (d,) or (k, d)} of whatever `select_direction` accepts, in order.

    A `DirectionResult` stands for its raw differences at residuals 1 to L - 1.
    """
    if isinstance(candidates, Candidates):
        found = candidates.table()
    elif hasattr(candidates, "directions") and hasattr(candidates, "norms"):
        raw = candidates.directions * candidates.norms[:, None]
        found = {(candidates.position, i + 1): raw[i] for i in range(raw.shape[0] - 1)}
    elif isinstance(candidates, Mapping):
        found = {(int(p), int(r)): mx.array(v) for (p, r), v in candidates.items()}
    else:
        raise InputError(
            f"candidates is a {type(candidates).__name__}; expected collect_candidates' result, a "
            "DirectionResult or {(position, residual): vector}"
        )
    if not found:
        raise InputError("there are no candidates; expected at least one direction")
    return dict(sorted(found.items()))
