"""Which layers to cut, from per-layer scores, as the tutorial has it. Knows numbers only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vauban.errors import InputError


def select_target_layers(
    scores: Sequence[float], strategy: str = "above_median", top_k: int = 10
) -> list[int]:
    """Block indices, ascending: "all", "above_median" (strictly above the median) or "top_k".

    Never empty: where all scores are equal nothing is above the median and all blocks are taken.

    Raises InputError for another strategy, no scores, NaN or inf, and top_k below 1.

    >>> select_target_layers([0.1, 0.9, 0.5], "top_k", top_k=2)
    [1, 2]
    """
    values = np.asarray(list(scores), dtype=np.float64)
    if values.size == 0:
        raise InputError("scores are empty; expected one number per block")
    if not np.isfinite(values).all():
        raise InputError("scores hold NaN or inf")
    if strategy == "all":
        return list(range(values.size))
    if strategy == "above_median":
        chosen = np.flatnonzero(values > np.median(values)).tolist()
        return chosen or list(range(values.size))
    if strategy == "top_k":
        if top_k < 1:
            raise InputError(f"top_k is {top_k}; expected at least 1")
        # Stable: of equal scores the earlier block is taken.
        return sorted(np.argsort(-values, kind="stable")[:top_k].tolist())
    raise InputError(f"strategy is {strategy!r}; expected 'all', 'above_median' or 'top_k'")
