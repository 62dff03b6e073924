"""Rounding that minds what the matrix reads: errors of early columns are made good by later ones.

Of all Ŵ on the grid with U Ŵ as asked, one with little tr((Ŵ - T) H (Ŵ - T)ᵀ), H = E[x xᵀ], is
found column by column as in GPTQ (Frantar et al. 2022, arXiv 2210.17323): what was done wrong so
far, R = E_done X_doneᵀ with H = XᵀX + D, is taken out of the rest by its best real continuation,
-R (I + X D^-1 Xᵀ)^-1 X D^-1 over the columns to come. Each column still has U Ŵ_j = a_j, which the
next ones do not disturb. NumPy only; sees no model.
"""

from __future__ import annotations

import numpy as np

from vauban.edits.jointly import round_jointly
from vauban.edits.moments import Energy
from vauban.edits.problem import Problem
from vauban.edits.two_sided import orthonormal

# Every coordinate counts as if it carried at least this share of the mean energy: inputs that were
# not read must not be forgotten altogether.
DAMPING = 0.1
# Unit inputs along the removed rows count as this many mean coordinates: they are to meet nothing.
ALONG = 16.0
# Blocks of columns that are rounded at once: more would cost time, fewer the feedback.
_BLOCKS = 128


def feedback_codes(
    asked: Problem,
    energy: Energy,
    removed: np.ndarray | None = None,
    damping: float = DAMPING,
    weight: float = ALONG,
) -> np.ndarray:
    """Grid indices (out, in) uint8, column block by column block.

    `energy` is that of the inputs; `removed` (j, in): rows whose inputs, which count as `weight`
    mean coordinates, must meet no substitute.
    """
    scale = 1.0 / max(energy.mean, 1e-30)
    factor = [energy.factor.astype(np.float64) * np.sqrt(scale)]
    diagonal = energy.rest.astype(np.float64) * scale + damping
    along = None if removed is None else orthonormal(removed)
    if along is not None:
        factor.append(np.sqrt(weight) * along.astype(np.float64))
    return _matrix(asked, _Continuation(np.concatenate(factor), diagonal, _width(asked)))


class _Continuation:
    """For each block of columns S: Y = (I + X D^-1 Xᵀ over S and all after it)^-1 X_S D_S^-1."""

    def __init__(self, x: np.ndarray, diagonal: np.ndarray, width: int) -> None:
        columns = x.shape[1]
        self.blocks = [slice(i, min(i + width, columns)) for i in range(0, columns, width)]
        self.x = x.astype(np.float32)
        self.answers = []
        # The inverse over what comes after, grown block by block from the end (Woodbury).
        after = np.eye(len(x))
        for part in reversed(self.blocks):
            seen = after @ x[:, part]
            scaled = seen / diagonal[part]
            answer = scaled @ np.linalg.inv(np.eye(seen.shape[1]) + x[:, part].T @ scaled)
            self.answers.append(answer.astype(np.float32))
            after -= answer @ seen.T
        self.answers.reverse()


def _width(asked: Problem) -> int:
    """Columns in a block: a power of two that divides the group."""
    wanted = max(1, asked.shape[1] // _BLOCKS)
    return min(asked.group & -asked.group, 1 << (wanted.bit_length() - 1))


def _matrix(asked: Problem, weights: _Continuation) -> np.ndarray:
    """The codes of a matrix: in each block every column exact, the block moved by the feedback."""
    codes = np.empty(asked.shape, np.uint8)
    wrong = np.zeros((asked.shape[0], len(weights.x)), np.float32)
    for block, answer in zip(weights.blocks, weights.answers, strict=True):
        moved = asked.target[:, block] - wrong @ answer
        # In one thread: on blocks so narrow two of them wait for each other more than they help.
        x, step, const = asked.columns(block, moved)
        codes[:, block] = round_jointly(x, step, asked.basis, const, asked.grid).T
        error = _read(asked, codes[:, block], block) - asked.target[:, block]
        wrong += error @ weights.x[:, block].T
    return codes


def _read(asked: Problem, codes: np.ndarray, block: slice) -> np.ndarray:
    """Ŵ in a block of one group's columns."""
    g = block.start // asked.group
    value = asked.grid.value(codes.astype(np.float32))
    read: np.ndarray = value * asked.steps[:, g, None] + asked.offsets[:, g, None]
    return read
