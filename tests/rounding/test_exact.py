"""Codes that are rounded together: brackets, flips and last steps against definitions."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rounding.drawn import error, matrix
from vauban.rounding import Problem, round_matrix
from vauban.rounding.exact import bracket, close_gap, missed, round_exact, tolerance
from vauban.rounding.grid import grid_of


def sums(
    c: np.ndarray, x: np.ndarray, ratio: np.ndarray, weight: np.ndarray, const: np.ndarray, top: int
) -> np.ndarray:
    """f(c) over all codes, in float64."""
    codes = np.clip(np.rint(c[:, None].astype(np.float32) * ratio + x), 0, top)
    return (codes.astype(np.float64) * weight).sum(1) + const


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    problems=st.integers(1, 9),
    codes=st.integers(1, 300),
    shared=st.booleans(),
    on_grid=st.booleans(),
    distance=st.sampled_from([0.0, 1e-7, 0.3, 5.0, 1e4]),
    seed=st.integers(0, 10_000),
)
def test_the_ends_of_a_bracket_lie_on_either_side_of_zero(
    bits: int, problems: int, codes: int, shared: bool, on_grid: bool, distance: float, seed: int
) -> None:
    """Only moving codes are summed inside the bracket: the sums over all of them must agree."""
    random, grid = np.random.default_rng(seed), grid_of("affine", bits)
    x = random.uniform(0, grid.top, (problems, codes)).astype(np.float32)
    x = np.rint(x) if on_grid else x
    u, step = random.normal(size=(2, 1 if shared else problems, codes)).astype(np.float32)
    ratio, weight = u / step, u * step
    const = distance * random.normal(size=problems)
    const -= sums(np.zeros(problems), x, ratio, weight, np.zeros(problems), grid.top)
    low, high = bracket(x, ratio, weight, const, grid)
    noise = 1e-5 * (np.abs(weight).sum(1) * grid.top + np.abs(const))
    at_low, at_high = (sums(end, x, ratio, weight, const, grid.top) for end in (low, high))
    # Nothing rounds to less than all codes at one end of the grid or to more than at the other.
    ends = [np.where((ratio > 0) == up, grid.top, 0.0) for up in (False, True)]
    least, most = ((end * weight).sum(1) + const for end in ends)
    within = (least < -noise) & (most > noise) & (np.abs(at_low - at_high) > noise)
    assert (at_low <= noise)[within].all() and (at_high >= -noise)[within].all()


def least_error(asked: Problem) -> float:
    """No rounding onto this grid with u Ŵ = 0 has a smaller ‖Ŵ - T‖: a bound by duality.

    For every c, min_q Σ err² - 2 c (u·err) is at most the least err² of all q with u·err = 0; the
    minimum rounds T + c u code by code. The best c is found by bisection, in float64.
    """
    steps, offsets = (
        np.repeat(a.astype(np.float64), asked.group, axis=1) for a in (asked.steps, asked.offsets)
    )
    t, u = asked.target.astype(np.float64), asked.basis[0].astype(np.float64)[:, None]

    def off(c: np.ndarray) -> np.ndarray:
        return np.clip(np.rint((t + u * c - offsets) / steps), 0, asked.grid.top) * steps + (
            offsets - t
        )

    low, high = np.full(t.shape[1], -1.0), np.full(t.shape[1], 1.0)
    for _ in range(40):
        middle = (low + high) / 2
        under = (u * off(middle)).sum(0) <= 0
        low, high = np.where(under, middle, low), np.where(under, high, middle)
    e = off(low)
    return float(np.sqrt((e**2).sum() - 2 * (low * (u * e).sum(0)).sum()))


@settings(max_examples=15, deadline=None)
@given(
    bits=st.sampled_from([3, 4, 5, 6, 8]),
    group=st.sampled_from([32, 64, 128]),
    rows=st.integers(3, 12),
    strength=st.sampled_from([1.0, 3.0]),
)
def test_rounding_is_nearly_the_best_there_is(
    bits: int, group: int, rows: int, strength: float
) -> None:
    """Exact along u, and within some percent of what no rounding onto this grid can go below."""
    asked, removed = matrix(64 * rows, 128, bits=bits, group=group, strength=strength)
    off = error(asked, round_matrix(asked))
    assert np.linalg.norm(asked.basis @ off) <= 1e-3 * np.linalg.norm(removed)
    bound = least_error(asked)
    assert 0.999 * bound <= np.linalg.norm(off) <= 1.06 * bound


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from([3, 4, 8]), k=st.integers(1, 3), shared=st.booleans(),
    on_grid=st.booleans(), reach=st.sampled_from([0.0, 0.2, 2.0]), seed=st.integers(0, 999),
)  # fmt: skip
def test_any_sum_within_reach_is_met(
    bits: int, k: int, shared: bool, on_grid: bool, reach: float, seed: int
) -> None:
    """Codes that lie on the grid, and are flat around zero, as well as any others."""
    random, grid = np.random.default_rng(seed), grid_of("affine", bits)
    x = random.uniform(0, grid.top, (20, 300)).astype(np.float32)
    x = np.rint(x) if on_grid else x
    u = np.linalg.qr(random.normal(size=(300, k)))[0].T.astype(np.float32)
    step = random.uniform(0.5, 2.0, (1 if shared else 20, 300)).astype(np.float32)
    const = reach * random.normal(size=(k, 20)) - missed(x, step, u, np.zeros((k, 20)), grid)
    left = missed(round_exact(x, step, u, const, grid), step, u, const, grid)
    # Sums in several dimensions lie further apart.
    assert (np.linalg.norm(left, axis=0) <= (1, 10, 30)[k - 1] * tolerance(step, u)[:, 0]).all()


def test_the_last_steps_are_the_cheapest_pair() -> None:
    """Against every pair of steps of small problems."""
    random, grid = np.random.default_rng(0), grid_of("affine", 4)
    x = random.uniform(2, 13, (30, 24)).astype(np.float32)
    step = random.uniform(0.5, 2.0, (30, 24)).astype(np.float32)
    u = random.normal(size=(1, 24)).astype(np.float32)
    q = np.rint(x)
    left = random.uniform(-1, 1, (1, 30))
    before, gap = q.copy(), left.copy()
    close_gap(q, x, step, u, left, grid)
    limit = tolerance(step, u)[:, 0]
    met = 0
    for row in range(30):
        cost = step[row] ** 2
        best = np.inf
        for (i, a), (j, b) in product(product(range(24), (-1, 1)), product(range(24), (-1, 0, 1))):
            if i == j and b:
                continue
            # The first step shrinks what is left, the second does not.
            pulls = [a * step[row, i] * u[0, i], b * step[row, j] * u[0, j]]
            if pulls[0] * gap[0, row] > 0 or pulls[1] * gap[0, row] < 0:
                continue
            if abs(gap[0, row] + sum(pulls)) <= limit[row]:
                off = [before[row, i] - x[row, i], before[row, j] - x[row, j]]
                price = cost[i] * ((off[0] + a) ** 2 - off[0] ** 2)
                best = min(best, price + cost[j] * ((off[1] + b) ** 2 - off[1] ** 2))
        if np.isfinite(best) and np.count_nonzero(q[row] != before[row]) <= 2:
            met += 1
            paid = (cost * ((q[row] - x[row]) ** 2 - (before[row] - x[row]) ** 2)).sum()
            assert paid == pytest.approx(best, abs=1e-4)
    assert met >= 20
    assert np.allclose(left, gap + ((q - before) * step * u[0]).sum(1), atol=1e-5)


def test_what_may_remain_is_judged_where_the_direction_is() -> None:
    """Outlier columns that carry nothing of it would make the limit as loose as they are large."""
    u = np.zeros((1, 128), np.float32)
    u[0, :64] = 1 / 8
    step = np.ones((2, 128), np.float32)
    far = step.copy()
    far[:, 64:] = 50.0
    assert np.array_equal(tolerance(far, u), tolerance(step, u))
    assert np.allclose(tolerance(2 * step, u), 2 * tolerance(step, u))
