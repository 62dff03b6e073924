"""Residuals of prompts, taken from the pass over them that generation starts with anyway.

`generate` fills a reading; whoever wants residuals and answers pays for one prefill. Knows batches
and recorded streams; runs no model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

from vauban.errors import ArchitectureError
from vauban.generation.batching import Batch
from vauban.models.families import BLOCKS_NOT_CALLED, family_of
from vauban.models.taps import Stream
from vauban.models.walk import several_streams


@dataclass
class PromptReading:
    """Residuals of prompts at chosen positions, kept from the pass that generation starts with.

    `positions` are negative and counted from each prompt's last token. After generation `values`
    holds (L+1, P, d) float32 by the prompt's number, interventions in force as while answering.
    """

    positions: tuple[int, ...]
    values: dict[int, mx.array] = field(default_factory=dict)

    def take(self, batch: Batch, stream: Stream, blocks: int) -> None:
        """Keep what the blocks recorded of a batch of prompts, and let go of the rest."""
        residuals = stream.residuals
        if len(residuals) != blocks + 1 or any(h.ndim != 3 for h in residuals):
            raise ArchitectureError(
                f"{len(residuals)} residuals of {blocks + 1} were recorded while generating"
            )
        columns = mx.array(batch.lengths)[:, None] + mx.array(self.positions)[None]
        kept = [mx.take_along_axis(h, columns[:, :, None], axis=1) for h in residuals]
        stacked = mx.stack(kept, axis=1).astype(mx.float32)
        mx.eval(stacked)
        self.values |= {row: stacked[place] for place, row in enumerate(batch.rows)}
        for seen in (stream.inputs, stream.outputs, stream.arguments):
            seen.clear()


def can_read_prompts(model: nn.Module) -> bool:
    """Whether blocks can be recorded while generating: they hand on one stream and are called."""
    return not several_streams(model) and family_of(model) not in BLOCKS_NOT_CALLED
