"""Round a matrix block by block of columns, each column exact along U, as GPTQ does.

Of all Ŵ on the grid with U Ŵ as asked, one with little tr((Ŵ - T) H (Ŵ - T)ᵀ) is built from blocks
of columns: what was done wrong so far, E X_doneᵀ with H = XᵀX + D, is taken out of the columns to
come by its best real continuation, -E X_doneᵀ (I + X D⁻¹ Xᵀ)⁻¹ X D⁻¹ (Frantar et al. 2022, arXiv
2210.17323). H holds the second moment of the inputs, where it is known, and the removed row
w = v/|v|: without it an input along w meets, in place of what was removed, a fixed pattern as large
(the leak).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vauban.rounding.exact import bracket, round_exact
from vauban.rounding.grid import inverse, parallel
from vauban.rounding.problem import Problem
from vauban.rounding.second_moment import Energy

# ‖(Ŵ - T) w‖ for unit inputs w along what was removed, in units of what was removed, at most.
LEAK = 0.15
# Share of the mean energy that every coordinate has at least: inputs that were not read must not be
# forgotten. Where the error is too large there is four times more of it.
DAMPING, _MORE = 0.1, 4.0
# Unit inputs along the removed rows count as this many mean coordinates, in later passes twice as
# many each time, and passes over the matrix at most.
_ALONG, _PASSES = 8.0, 6
# Blocks of columns (fewer lose feedback), and columns that one thread rounds (fewer cost time).
_BLOCKS, _TOGETHER = 128, 32


def round_matrix(
    asked: Problem,
    removed: np.ndarray | None = None,
    energy: Energy | None = None,
    most: float = np.inf,
) -> np.ndarray:
    """Grid indices (out, in) uint8 with U (s·q + b) as asked in every column.

    removed (j, in): rows whose inputs are to meet no substitute, at most `LEAK` where a few passes
    reach that. `energy`: that of the inputs, damped until ‖Ŵ - T‖² is at most `most`.
    """
    along = orthonormal(np.zeros((1, asked.shape[1])) if removed is None else removed)
    shift = np.zeros((asked.shape[0], len(along)), np.float32)
    damping, weight = DAMPING, _ALONG
    for _ in range(_PASSES):
        done = _one_pass(asked, along, shift, *_hessian(asked, energy, damping, along, weight))
        leak = 0.0
        if removed is not None and len(along):
            leak = float(np.linalg.norm(done.put @ (along @ removed.T)) / np.vdot(removed, removed))
        too_large = energy is not None and done.error > most
        if leak <= LEAK and not too_large:
            break
        # What the removed rows needed once is where the next pass begins.
        shift = done.shift
        weight *= 2.0 if leak > LEAK else 1.0
        damping *= _MORE if too_large else 1.0
    return done.codes


def shifted_target(asked: Problem) -> np.ndarray:
    """T + Uᵀ c (out, in), which plain rounding onto the grid turns into codes with U Ŵ as asked.

    What a better grid has to round well: a weight that lies on its grid costs a whole step to move,
    one between two codes next to nothing.
    """
    moved = np.empty(asked.shape, np.float32)

    def some(part: slice) -> None:
        for first in range(part.start, part.stop, asked.group):
            columns = slice(first, first + asked.group)
            target = asked.target[:, columns]
            for u in range(len(asked.basis)):
                x, step, basis, const = asked.columns(columns, target)
                ratio, weight = basis[u] * inverse(step), basis[u] * step
                c = np.mean(bracket(x, ratio, weight, const[u], asked.grid), axis=0)
                target = target + np.outer(basis[u], c.astype(np.float32))
            moved[:, columns] = target

    parallel(some, asked.shape[1], asked.group)
    return moved


def orthonormal(rows: np.ndarray) -> np.ndarray:
    """Row-orthonormal basis (j', n) of what some rows span, in float64; j' 0 where all are zero."""
    values, basis = np.linalg.svd(rows.astype(np.float64), full_matrices=False)[1:]
    found: np.ndarray = basis[values > 1e-6 * max(values.max(initial=0.0), 1e-30)]
    return found


def _hessian(
    asked: Problem, energy: Energy | None, damping: float, along: np.ndarray, weight: float
) -> tuple[np.ndarray, list[slice], list[np.ndarray]]:
    """X (r, in) of H = XᵀX + D, blocks of columns, and what each makes of an error before it.

    For a block S that is (I + X D⁻¹ Xᵀ)⁻¹ X_S D_S⁻¹ with the sum over S and all columns after it,
    grown from the last block on (Woodbury).
    """
    columns = asked.shape[1]
    x, diagonal = np.zeros((0, columns)), np.ones(columns)
    if energy is not None:
        x, diagonal = energy.scaled(damping)
        weight *= 1.0 + damping
    x = np.concatenate([x, np.sqrt(weight) * along])
    # A power of two that divides the group, so that a block has one scale per row.
    width = min(asked.group & -asked.group, 1 << (max(1, columns // _BLOCKS).bit_length() - 1))
    blocks = [slice(i, i + width) for i in range(0, columns, width)]
    answers, after = [], np.eye(len(x))
    for block in reversed(blocks):
        seen = after @ x[:, block]
        scaled = seen / diagonal[block]
        answer = scaled @ np.linalg.inv(np.eye(width) + x[:, block].T @ scaled)
        after -= answer @ seen.T
        answers.append(answer.astype(np.float32))
    return x.astype(np.float32), blocks, answers[::-1]


@dataclass(frozen=True)
class _Done:
    """Codes, ‖Ŵ - T‖², (Ŵ - T) wᵀ (out, j), and the shift along w that this took (out, j)."""

    codes: np.ndarray
    error: float
    put: np.ndarray
    shift: np.ndarray


def _one_pass(
    asked: Problem, along: np.ndarray, shift: np.ndarray, x: np.ndarray, blocks: list[slice],
    answers: list[np.ndarray],
) -> _Done:  # fmt: skip
    """Round block after block of T + shift w, moved by the feedback."""
    w, codes, error = along.astype(np.float32), np.empty(asked.shape, np.uint8), 0.0
    wrong, put = np.zeros((asked.shape[0], len(x)), np.float32), np.zeros_like(shift)
    rows, half = slice(len(x) - len(w), None), blocks[len(blocks) // 2].start
    taken = np.zeros_like(shift)
    for block, answer in zip(blocks, answers, strict=True):
        moved = asked.target[:, block] - wrong @ answer + shift @ w[:, block]

        def some(part: slice, block: slice = block, moved: np.ndarray = moved) -> None:
            columns = slice(block.start + part.start, block.start + part.stop)
            problems = asked.columns(columns, moved[:, part])
            codes[:, columns] = round_exact(*problems, asked.grid).T

        parallel(some, moved.shape[1], _TOGETHER)
        if block.start >= half:
            # The first half of a pass only builds up what the removed rows need.
            taken += (shift @ w[:, block] - wrong[:, rows] @ answer[rows]) @ w[:, block].T
        off = asked.values(codes[:, block], block) - asked.target[:, block]
        error += float(np.vdot(off, off))
        put += off @ w[:, block].T
        wrong += off @ x[:, block].T
    return _Done(codes, error, put, taken @ np.linalg.pinv(w[:, half:] @ w[:, half:].T))
