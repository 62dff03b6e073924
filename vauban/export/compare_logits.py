"""The logits of an exported folder against those of the run-time cut. Judges nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from vauban._common import probe_tokens
from vauban.claims import translated
from vauban.edits.plan import EditPlan
from vauban.errors import ModelError
from vauban.export.adapter import is_adapter
from vauban.models import anatomy, describe, forward, model_folder, weight_files
from vauban.models.loading import check_folder

_HALF = (mx.float16, mx.bfloat16)


@dataclass(frozen=True)
class LogitsCompared:
    """Largest differences over the logits of a probe, and their size.

    difference  exported from the run-time cut
    moved       uncut from the run-time cut
    size        the largest logit of the run-time cut
    """

    difference: float
    moved: float
    size: float

    @property
    def share(self) -> float:
        """`difference` as a share of what the cut changes."""
        return self.difference / max(self.moved, 1e-30)

    def limit(self, *, exact: bool) -> float:
        """The largest `share` that storage explains.

        Edited matrices in float32 (`exact`) differ by the order of additions alone: 1 % of what
        the cut changes. In half precision they are rounded anew, which makes a few percent of it
        and, where a router then picks another expert, up to a third; an export that is half as far
        from the run-time cut as the uncut model is another model. Where a cut changes next to
        nothing, rounding is measured against the logits themselves.
        """
        part, noise = (1e-2, 1e-4) if exact else (0.5, 3e-2)
        return part + noise * self.size / max(self.moved, 1e-30)


def compare_logits(folder: Path, plan: EditPlan, source: str | Path) -> LogitsCompared:
    """Run the uncut model, the run-time cut and the exported folder on a fixed probe.

    An adapter is opened on `source`, the model it was written for. Only the model is loaded, no
    tokenizer.
    """
    original = plan.model
    tokens = mx.array([probe_tokens(24, anatomy(original).vocabulary)])

    def logits(model: nn.Module, interventions: Any = ()) -> mx.array:
        values = forward(model, tokens, positions=None, interventions=interventions).logits
        assert values is not None
        # Entries that a family rules out are the same in all three.
        return mx.where(values == -mx.inf, 0, values).astype(mx.float32)

    virtual = logits(original, plan.virtual())
    moved = mx.abs(logits(original) - virtual).max()
    difference = mx.abs(logits(_opened(folder, source, original)) - virtual).max()
    return LogitsCompared(float(difference), float(moved), float(mx.abs(virtual).max()))


def logits_difference(folder: Path, plan: EditPlan, source: str | Path) -> float:
    """max |exported - run-time cut| / max |uncut - run-time cut| over the logits of a probe.

    An adapter is opened on `source`, the model it was written for.
    """
    return compare_logits(folder, plan, source).share


def _opened(folder: Path, source: str | Path, like: nn.Module) -> nn.Module:
    """The exported model, computing in float32 where `like` does."""
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    try:
        if is_adapter(folder):
            with weight_files(model_folder(source)).loadable() as place:
                told = translated(check_folder(model_folder(source)))
                model = load_adapters(load_model(place, model_config=told)[0], str(folder))
        else:
            model = load_model(folder)[0]
    except (ValueError, KeyError, TypeError, RuntimeError, OSError, AttributeError) as error:
        raise ModelError(f"mlx-lm cannot load {folder}: {error}") from error
    model.eval()
    if describe(like).dtype == "float32":
        wide = tree_map(
            lambda v: v.astype(mx.float32) if v.dtype in _HALF else v, model.parameters()
        )
        model.update(wide)
    return model
