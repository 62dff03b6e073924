"""Descent over a table's codes: exact along the direction, and cheap where its rows matter."""

from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vauban.edits.descent import _descend, _settle, descended_codes
from vauban.edits.exact import exact_codes
from vauban.edits.grids import FLOAT_MODES
from vauban.edits.jointly import missed
from vauban.edits.mending import enough
from vauban.edits.moments import Energy
from vauban.edits.problem import Problem, problem


def table(
    rows: int, width: int, k: int = 1, *, bits: int = 4, group: int = 64, mode: str = "affine",
    alpha: float = 1.0, seed: int = 0,
) -> tuple[Problem, np.ndarray]:  # fmt: skip
    """(a packed random table to be cut along k directions, what its rows had along them)."""
    random = np.random.default_rng(seed)
    basis = np.linalg.qr(random.normal(size=(width, k)))[0].T.astype(np.float32)
    weight = mx.array(random.normal(size=(rows, width)).astype(np.float32))
    q, s, *b = mx.quantize(weight, group_size=group, bits=bits, mode=mode)
    offsets = b[0] if b else None
    stored = mx.dequantize(q, s, offsets, group_size=group, bits=bits, mode=mode)
    held = np.array(stored.astype(mx.float32))
    had = held @ basis.T
    target = held - alpha * had @ basis
    aim = None if alpha == 1 else basis @ target.T
    asked = problem(
        target, mx.array(basis), s, offsets, group_size=group, bits=bits, mode=mode, axis="input",
        aim=aim,
    )  # fmt: skip
    return asked, had


def sensitivity(width: int, rank: int = 12) -> Energy:
    """Few directions matter much, as in a trained model."""
    random = np.random.default_rng(1)
    factor = random.normal(size=(rank, width)) / np.arange(1, rank + 1)[:, None]
    return Energy(factor.astype(np.float32), np.full(width, 1e-3, np.float32), 100)


def error(asked: Problem, codes: np.ndarray) -> np.ndarray:
    step = np.repeat(asked.steps, asked.group, 1).astype(np.float64)
    offset = np.repeat(asked.offsets, asked.group, 1)
    found: np.ndarray = asked.grid.value(codes.astype(np.float32)) * step + offset - asked.target
    return found


def loss(asked: Problem, codes: np.ndarray, energy: Energy) -> float:
    e = error(asked, codes)
    return float(((e @ energy.factor.T) ** 2).sum() + (e**2 * energy.rest).sum())


@settings(max_examples=20, deadline=None)
@given(
    form=st.sampled_from(
        [(bits, group, "affine") for bits, group in product((3, 4, 5, 6, 8), (32, 64, 128))]
        + [(*FLOAT_MODES[mode], mode) for mode in FLOAT_MODES]
    ),
    k=st.sampled_from((1, 1, 2)),
    rows=st.integers(1, 40),
    alpha=st.sampled_from((1.0, 0.5, -1.0)),
    seed=st.integers(0, 99),
)
def test_the_direction_comes_out_as_asked_and_the_rest_costs_less(
    form: tuple[int, int, str], k: int, rows: int, alpha: float, seed: int
) -> None:
    bits, group, mode = form
    asked, had = table(rows, 256, k, bits=bits, group=group, mode=mode, alpha=alpha, seed=seed)
    energy = sensitivity(256)
    codes = descended_codes(asked, energy)
    assert codes.dtype == np.uint8 and codes.max() <= asked.grid.top
    off = error(asked, codes) @ asked.basis.T
    assert np.linalg.norm(off) <= 1e-3 * max(np.linalg.norm(had), 0.5 * np.sqrt(rows))
    if rows >= 16:
        # Of one row nothing is promised: plain rounding may be lucky.
        assert loss(asked, codes, energy) <= loss(asked, exact_codes(asked), energy)


def test_what_does_not_matter_is_what_moves() -> None:
    """A tenth of plain exact rounding's loss where twelve directions of 256 carry all of it."""
    asked, _ = table(200, 256)
    energy = sensitivity(256)
    assert loss(asked, descended_codes(asked, energy), energy) <= 0.2 * loss(
        asked, exact_codes(asked), energy
    )


def test_rows_that_are_all_alike_cost_as_much_as_plain_exact_rounding() -> None:
    asked, _ = table(200, 256)
    white = Energy(np.zeros((1, 256), np.float32), np.ones(256, np.float32), 1)
    found = np.linalg.norm(error(asked, descended_codes(asked, white)))
    assert found <= 1.05 * np.linalg.norm(error(asked, exact_codes(asked)))


def test_the_last_steps_are_the_cheapest_of_all_pairs() -> None:
    """Against every pair of steps of a small row, each computed from the loss itself."""
    asked, _ = table(6, 32, group=32, bits=3)
    random = np.random.default_rng(2)
    factor = random.normal(size=(5, 32)).astype(np.float32)
    diagonal = np.ones(32, np.float32)
    m = factor.T.astype(np.float64) @ factor + np.diag(diagonal)
    x, step, const = asked.rows(slice(0, 6))
    index, slope = _descend(asked, x, step, factor, diagonal)
    # A miss that pairs of steps can make good, and single steps hardly.
    const = const + 0.05
    left = missed(index, step, asked.basis, const, asked.grid)
    before, settled, held = index.copy(), index.copy(), left.copy()
    limit = enough(step, asked.basis)[:, 0]
    _settle(asked, settled, step, slope, factor, diagonal, held, limit[:, None])
    again = missed(settled, step, asked.basis, const, asked.grid)
    assert np.allclose(held, again, atol=1e-5)

    def cost(row: int, codes: np.ndarray) -> float:
        e = codes * step[row] + np.repeat(asked.offsets, 32, 1)[row] - asked.target[row]
        return float(e @ m @ e)

    reached = 0
    for row in range(6):
        best = np.inf
        for i, j in product(range(32), repeat=2):
            for a, b in product((-1, 1), repeat=2):
                codes = before[row].copy()
                codes[i] += a
                if i != j:
                    codes[j] += b
                gap = left[0, row] + (codes - before[row]) * step[row] @ asked.basis[0]
                if codes.min() >= 0 and codes.max() <= 7 and abs(gap) <= limit[row]:
                    best = min(best, cost(row, codes))
        if np.isfinite(best):
            reached += 1
            assert cost(row, settled[row]) == pytest.approx(best, rel=1e-4)
        else:
            assert np.array_equal(settled[row], before[row])
    assert reached >= 3


def test_what_may_stay_is_judged_where_the_direction_is() -> None:
    """Outlier columns that carry nothing of it would make the limit as loose as they are large."""
    u = np.zeros((1, 128), np.float32)
    u[0, :64] = 1 / 8
    step = np.ones((2, 128), np.float32)
    far = step.copy()
    far[:, 64:] = 50.0
    assert np.array_equal(enough(far, u), enough(step, u))
    assert np.allclose(enough(2 * step, u), 2 * enough(step, u))


def test_groups_without_steps_and_rows_without_the_direction() -> None:
    """Constant rows keep what they hold; nothing is divided by zero."""
    asked, _ = table(4, 128)
    asked.steps[0] = 0.0
    codes = descended_codes(asked, sensitivity(128))
    found = error(asked, codes)
    assert np.isfinite(found).all()
    assert np.abs(found[1:] @ asked.basis.T).max() <= 1e-2
