"""Conditional steering (CAST, Lee et al. 2024, arXiv 2409.05907): row by row, decided once.

The value is frozen; what a run decides lives in an object that `started` makes for that run.
Knows arrays and row lengths; knows no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from vauban.errors import InputError
from vauban.interventions.outputs import ModuleOutputs
from vauban.interventions.values import Change, Intervention
from vauban.linalg import as_basis


def started(interventions: Iterable[Intervention], lengths: Sequence[int]) -> list[Intervention]:
    """The interventions for one batch: those that decide something get a fresh state.

    `lengths` (B,) counts each row's real tokens in the right-padded prompt. The objects that hold
    a state have `filter(rows)`, to be called when finished rows leave the batch.
    """
    return [i.start(lengths) if isinstance(i, Conditional) else i for i in interventions]


def shares_prefix(interventions: Iterable[Intervention]) -> bool:
    """Whether a prompt's start may be read before its end is known.

    A conditional intervention changes all tokens of a prompt by what the whole prompt says.
    """
    return not any(isinstance(i, Conditional) for i in interventions)


@dataclass(frozen=True, eq=False)
class Conditional:
    """`intervention` for the prompts whose mean residual points along a condition direction.

    In prefill the cosine of each row's mean residual at `layer` (over its real tokens) with
    `condition_direction` (d,) is compared with `threshold`, > with `above`, else <=. Rows that
    meet it are changed from that residual on, all tokens, and at every site while decoding; the
    others are left exactly as they are. `forward` takes the tokens it is given as the prompt.
    """

    condition_direction: mx.array
    threshold: float
    intervention: Intervention
    layer: int
    above: bool = True

    def __init__(
        self,
        condition_direction: mx.array,
        threshold: float,
        intervention: Intervention,
        *,
        layer: int,
        above: bool = True,
    ) -> None:
        if not -1.0 <= threshold <= 1.0:
            raise InputError(f"Conditional: threshold is {threshold}; a cosine lies in [-1, 1]")
        if condition_direction.ndim != 1:
            raise InputError(
                f"Conditional: condition_direction has shape {condition_direction.shape}; "
                "expected (d,)"
            )
        if layer < 0:
            raise InputError(f"Conditional: layer {layer} is negative; residuals count from 0")
        if isinstance(intervention, Conditional | ModuleOutputs):
            raise InputError(
                f"Conditional: {type(intervention).__name__} cannot be switched row by row; "
                "use an intervention on the stream"
            )
        set_field = object.__setattr__
        set_field(self, "condition_direction", condition_direction)
        set_field(self, "threshold", float(threshold))
        set_field(self, "intervention", intervention)
        set_field(self, "layer", int(layer))
        set_field(self, "above", above)
        set_field(self, "_unit", as_basis(condition_direction, "Conditional")[0])

    def start(self, lengths: Sequence[int]) -> ConditionalRun:
        """The state of one run over rows of these lengths."""
        return ConditionalRun(self, lengths)

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Change | None:
        raise InputError(
            "Conditional decides per prompt; pass it to forward, generate or collect_activations, "
            "which start it (vauban.interventions.started)"
        )

    def cosines(self, h: mx.array, lengths: Sequence[int]) -> mx.array:
        """(B,) cosine of each row's mean over its real tokens, h (B, T, d) right-padded."""
        counts = mx.array(list(lengths))[:, None]
        real = (mx.arange(h.shape[1])[None] < counts)[..., None]
        # where, not a product: padded positions may hold anything.
        mean = mx.where(real, h.astype(mx.float32), 0.0).sum(axis=1) / counts
        unit: mx.array = self._unit  # type: ignore[attr-defined]
        return (mean @ unit) / mx.maximum(mx.linalg.norm(mean, axis=-1), 1e-12)


class ConditionalRun:
    """One run of a `Conditional`: `decision` (B,) bool once the prompt has been read."""

    def __init__(self, value: Conditional, lengths: Sequence[int]) -> None:
        self.value = value
        self.lengths = list(lengths)
        self.decision: mx.array | None = None

    def filter(self, rows: Any) -> None:
        """Keep the decisions of these rows; the others have finished."""
        if self.decision is not None:
            self.decision = self.decision[rows]

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Change | None:
        value = self.value
        if value.layer > n_layers:
            raise InputError(
                f"Conditional: residual {value.layer} does not exist; the model has 0 to {n_layers}"
            )
        step = value.intervention.change(site, layer, n_layers, prefill)
        here = prefill and site == "block_input" and layer == value.layer
        if prefill and layer < value.layer:
            return None
        if not here and step is None:
            return None

        def run(h: mx.array) -> mx.array:
            if here:
                cosine = value.cosines(h, self.lengths)
                above = cosine > value.threshold
                self.decision = above if value.above else ~above
            if step is None:
                return h
            if self.decision is None:
                raise InputError("Conditional: tokens were decoded before any prompt was read")
            return mx.where(self.decision.reshape(-1, *[1] * (h.ndim - 1)), step(h), h)

        return run
