"""Packed random matrices and tables whose direction is cut, in NumPy."""

from typing import Any

import mlx.core as mx
import numpy as np

from vauban._arrays import as_numpy
from vauban.rounding import Energy, InputMoments, Problem, problem


def rows_of(k: int, size: int, seed: int = 0) -> np.ndarray:
    """(k, size) row-orthonormal."""
    drawn = np.random.default_rng(seed).normal(size=(size, k))
    basis: np.ndarray = np.linalg.qr(drawn)[0].T.astype(np.float32)
    return basis


def matrix(
    out: int, width: int, *, bits: int = 4, group: int = 64, mode: str = "affine", k: int = 1,
    strength: float = 1.0, axis: Any = "output", alpha: float = 1.0, seed: int = 0,
) -> tuple[Problem, np.ndarray]:  # fmt: skip
    """(what is asked, on the stored grid; the removed rows) of a matrix, or of a table's rows."""
    u = rows_of(k, out if axis == "output" else width, seed)
    full = 0.02 * np.random.default_rng(seed + 1).normal(size=(out, width))
    if axis == "output":
        full += (strength - 1) * u.T @ (u @ full)
    stored = mx.quantize(mx.array(full).astype(mx.bfloat16), group, bits, mode=mode)
    scales, offsets = stored[1], stored[2] if mode == "affine" else None
    if offsets is not None:
        scales, offsets = scales.astype(mx.float32), offsets.astype(mx.float32)
    before = np.array(
        mx.dequantize(stored[0], scales, offsets, group, bits, mode=mode, dtype=mx.float32)
    )
    along = u @ (before if axis == "output" else before.T)
    taken = u.T @ along if axis == "output" else along.T @ u
    target = before - alpha * taken
    aim = None if alpha == 1.0 else (1 - alpha) * along.astype(np.float64)
    asked = problem(
        target, u, as_numpy(scales), None if offsets is None else as_numpy(offsets),
        group_size=group, bits=bits, mode=mode, axis=axis, aim=aim,
    )  # fmt: skip
    return asked, along


def error(asked: Problem, codes: np.ndarray) -> np.ndarray:
    """Ŵ - T of codes, in float64."""
    step, offset = (
        np.repeat(a.astype(np.float64), asked.group, axis=1) for a in (asked.steps, asked.offsets)
    )
    off: np.ndarray = asked.grid.values[codes] * step + offset - asked.target
    return off


def steep(width: int, strength: float, rows: int = 600, seed: int = 0) -> Energy:
    """Inputs along few directions: the further they stand out, the dearer rounding for them."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, width)) * np.arange(1, width + 1) ** -strength
    turn = np.linalg.qr(random.normal(size=(width, width)))[0]
    return InputMoments(width, width).update((x @ turn).astype(np.float32)).energy()
