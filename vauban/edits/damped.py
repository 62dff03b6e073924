"""Calibrated rounding that is no dearer than it may be: damped until its plain error is in bounds.

What is rounded for what it reads on some texts pays elsewhere. Whatever those texts say, the error
over all inputs stays near that of requantizing naively. NumPy, and mlx for its own quantization;
sees no module.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from vauban.edits.descent import DAMPING as TABLE_DAMPING
from vauban.edits.descent import descended_codes
from vauban.edits.feedback import ALONG, feedback_codes
from vauban.edits.feedback import DAMPING as MATRIX_DAMPING
from vauban.edits.modules import unpack
from vauban.edits.moments import Energy
from vauban.edits.problem import Problem

# ‖Ŵ - T‖ as a multiple of what fresh scales and plain rounding have; not with 8 codes or fewer,
# where these give most of the cut back and are no measure.
MOST, _CODES = 1.34, 8
# ‖(Ŵ - T) w‖ for unit inputs w along what was removed, in units of what was removed.
LEAK = 0.15
# The error falls as a small power of the damping, about 1/14 on the organism: from what is too much
# follows the next damping, between these factors, at most so many times.
_POWER, _FACTORS, _TRIES = 14.0, (1.4, 8.0), 5
# Where inputs along what was removed meet too much they count this many times as much.
_MORE = 3.0
_ROWS = 256


def damped_codes(
    asked: Problem, energy: Energy, removed: np.ndarray | None = None
) -> np.ndarray | None:
    """Grid indices rounded for `energy`; None where no damping keeps them within `MOST` and `LEAK`.

    A table (axis "input") is rounded by `descent`, a matrix by `feedback`, with `removed` (j, in)
    the rows whose inputs must meet no substitute.
    """
    most = MOST**2 * naive_error(asked) if len(asked.grid.values) > _CODES else np.inf
    table = asked.axis == "input"
    damping, weight = TABLE_DAMPING if table else MATRIX_DAMPING, ALONG
    for _ in range(_TRIES):
        if table:
            codes = descended_codes(asked, energy, damping)
        else:
            codes = feedback_codes(asked, energy, removed, damping, weight)
        error, leak = _price(asked, codes, removed)
        over = error / max(most, 1e-30)
        if over <= 1 and leak <= LEAK:
            return codes
        if leak > LEAK:
            weight *= _MORE
        if over > 1:
            # `over` is of squares.
            damping *= float(np.clip(over ** (_POWER / 2), *_FACTORS))
    return None


def naive_error(asked: Problem) -> float:
    """‖Q(T) - T‖² for MLX's own quantization of the target."""
    form = (asked.group, asked.grid.bits, asked.mode)
    total = 0.0
    for first in range(0, asked.shape[0], _ROWS):
        rows = mx.array(asked.target[first : first + _ROWS])
        packed, scales, *biases = mx.quantize(rows, form[0], form[1], mode=form[2])
        off = unpack(packed, scales, biases[0] if biases else None, *form) - rows
        total += float((off * off).sum())
    return total


def _price(asked: Problem, codes: np.ndarray, removed: np.ndarray | None) -> tuple[float, float]:
    """(‖Ŵ - T‖², leak), the leak 0 where nothing was removed."""
    total, put = 0.0, 0.0
    for first in range(0, asked.shape[0], _ROWS):
        part = slice(first, first + _ROWS)
        value = asked.grid.value(codes[part].astype(np.float32))
        off = value.reshape(*asked.steps[part].shape, asked.group)
        off *= asked.steps[part, :, None]
        off += asked.offsets[part, :, None]
        off = off.reshape(value.shape) - asked.target[part]
        total += float(np.vdot(off, off))
        if removed is not None:
            along = off @ removed.T
            put += float(np.vdot(along, along))
    had = 0.0 if removed is None else float(np.vdot(removed, removed))
    return total, float(np.sqrt(put)) / had if had > 0 else 0.0
