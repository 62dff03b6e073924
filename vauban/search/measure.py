"""`vauban.measure`: the estimate of `directions`, with the layer and position chosen by answers.

Choosing by answers needs generation and verdicts, which stand to the right of `directions`. So the
estimate takes a chooser, and this file brings it. Adds no arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from vauban._common import Progress
from vauban.directions import DirectionResult
from vauban.directions import measure as estimate
from vauban.directions.candidates import Key
from vauban.search.answers import choose_by_answers


def measure(
    model: nn.Module,
    tokenizer: Any,
    harmful: Sequence[Any],
    harmless: Sequence[Any],
    clip_quantile: float | Literal["auto"] = 0.0,
    *,
    method: str = "mean_difference",
    loud_multiple: float | None = None,
    layer: int | Literal["auto", "causal", "answers"] = "auto",
    positions: tuple[int, ...] | Literal["post_instruction"] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    selection: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> DirectionResult:
    """The direction from harmless to harmful prompts in the residual stream.

    Difference in means (Arditi et al. 2024, arXiv 2406.11717, eq. 1) at the output of every block
    and at each position. A held-out third of the prompts (seeded) scores the layers: Cohen's d of
    its projections on the direction of the other two thirds. `layer` is a block index, or

    "auto"     the largest Cohen's d among residuals <= int(0.8 · L), ties to the earlier
    "causal"   `select_direction` on the directions of the other two thirds, at the same residuals,
               asked at most 32 + 32 held-out prompts; where none passes its filters, they are
               taken away one by one, and `warnings` say which
    "answers"  `choose_by_answers` on the same prompts, at all residuals from 1 to L-1

    `selection` holds options of the last two. The returned directions use all prompts.

    `method`: "mean_difference"; "masked_mean_difference", the same without the coordinates whose
    mean over harmless prompts exceeds `loud_multiple` (None: 50) times the median
    (`fit_masked_difference`; `provenance` names them); or "variance_scaled"
    (`fit_scaled_difference`). Where one coordinate is far louder than the others (Gemma 3), it
    rules the plain difference, and the other two do not follow it.

    `positions`: None is the last token, a tuple of negative ints, or "post_instruction" (every
    template token after the instruction); the best position is kept. `clip_quantile` > 0
    winsorizes the components per residual and keeps all activations in memory; 0 streams them.
    "auto" streams, and where a coordinate is loud reads again and winsorizes the residuals that
    have one, at the quantile of `loud_coordinates.clip_for`; `provenance` says what it chose.

    Raises InputError for an empty set, a single prompt, equal sets, NaN activations, a layer out
    of range, an unknown method, a mask that leaves nothing. `result.warnings` says where the zero
    point lies on the wrong side, and where loud coordinates rule a plain difference.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> harmful = ["How do I forge a ticket?", "Tell me how to rob a shop."] * 2
    >>> harmless = ["How do I bake a cake?", "Name a colour.", "What is 2 plus 3?", "Say hello."]
    >>> vauban.measure(model, tokenizer, harmful, harmless, layer=2).residual_index
    3
    """
    options: dict[str, Any] = {
        "method": method, "loud_multiple": loud_multiple, "positions": positions,
        "batch_size": batch_size, "seed": seed,
        "progress": progress,
    }  # fmt: skip
    if layer != "answers":
        return estimate(
            model, tokenizer, harmful, harmless, clip_quantile, layer=layer, selection=selection,
            **options,
        )  # fmt: skip

    def by_answers(
        offered: dict[Key, mx.array], prompts: Mapping[str, list[Any]]
    ) -> tuple[Key, dict[str, Any], list[str]]:
        choice = choose_by_answers(
            model, tokenizer, offered, prompts["harmful"], prompts["harmless"],
            **{"seed": seed, "batch_size": batch_size, "progress": progress, **(selection or {})},
        )  # fmt: skip
        facts = {"layer": "answers", "answers": choice.to_dict()}
        return (choice.position, choice.layer), facts, list(choice.notes)

    return estimate(model, tokenizer, harmful, harmless, clip_quantile, layer=by_answers, **options)
