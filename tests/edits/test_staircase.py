"""Roots of staircases: what a bracket promises, whatever the codes do."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

from vauban._backend import one_blas_thread
from vauban.edits.grids import grid_of
from vauban.edits.refit import affine_grid, refit
from vauban.edits.staircase import root


def sums(
    c: np.ndarray, x: np.ndarray, ratio: np.ndarray, weight: np.ndarray, const: np.ndarray, top: int
) -> np.ndarray:
    """f(c) over all codes, rounded as `root` does and summed in float64."""
    codes = np.clip(np.rint(c[:, None].astype(np.float32) * ratio + x), 0, top)
    return (codes.astype(np.float64) * weight).sum(1) + const


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    problems=st.integers(1, 9),
    codes=st.integers(1, 300),
    shared=st.booleans(),
    on_grid=st.booleans(),
    warm=st.booleans(),
    distance=st.sampled_from([0.0, 1e-7, 0.3, 5.0, 1e4]),
    seed=st.integers(0, 10_000),
)
def test_the_root_lies_between_the_ends_and_the_ends_on_either_side_of_zero(
    bits: int, problems: int, codes: int, shared: bool, on_grid: bool, warm: bool,
    distance: float, seed: int,
) -> None:  # fmt: skip
    """Only moving codes are summed inside the bracket: the sums over all of them must agree."""
    rng, grid = np.random.default_rng(seed), grid_of("affine", bits)
    x = rng.uniform(0, grid.top, (problems, codes)).astype(np.float32)
    x = np.rint(x) if on_grid else x
    u, step = rng.normal(size=(2, 1 if shared else problems, codes)).astype(np.float32)
    ratio, weight = u / step, u * step
    start = rng.normal(size=problems).astype(np.float32) if warm else None
    const = distance * rng.normal(size=problems)
    const -= sums(np.zeros(problems), x, ratio, weight, np.zeros(problems), grid.top)
    low, high, c = root(x, ratio, weight, const, grid, start)
    assert (np.minimum(low, high) <= c).all() and (c <= np.maximum(low, high)).all()
    noise = 1e-5 * (np.abs(weight).sum(1) * grid.top + np.abs(const))
    at_low, at_high = (sums(end, x, ratio, weight, const, grid.top) for end in (low, high))
    # Nothing rounds to less than all codes at one end of the grid or to more than at the other.
    ends = [np.where((ratio > 0) == up, grid.top, 0.0) for up in (False, True)]
    least, most = ((end * weight).sum(1) + const for end in ends)
    within = (least < -noise) & (most > noise)
    reached = np.abs(at_low - at_high) > noise
    assert (at_low <= noise)[within & reached].all() and (at_high >= -noise)[within & reached].all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_grid_is_replaced_where_a_fresh_one_is_clearly_better(bits: int) -> None:
    """As every group's two errors say, though few groups are rounded on both."""
    rng = np.random.default_rng(1)
    target = (0.02 * rng.standard_normal((64, 256))).astype(np.float32)
    groups = target.reshape(64, 4, 64)
    width = rng.uniform(0.8, 1.3, (64, 4)).astype(np.float32)
    kept = affine_grid(width * groups.min(-1), width * groups.max(-1), bits)
    fresh = affine_grid(groups.min(-1), groups.max(-1), bits)

    def error(step: np.ndarray, offset: np.ndarray) -> np.ndarray:
        step, offset = step[..., None].astype(np.float64), offset[..., None]
        codes = np.clip(np.rint((groups - offset) / step), 0, 2**bits - 1)
        return ((codes * step + offset - groups) ** 2).sum(-1)

    better = error(*fresh) < 0.9 * error(*kept)
    assert 0.2 < better.mean() < 0.95
    found = refit(target, mx.array(kept[0]), mx.array(kept[1]), bits, 64)
    for array, old, new in zip(found, kept, fresh, strict=True):
        assert np.allclose(np.array(array), np.where(better, new, old), rtol=1e-6)


def test_products_are_held_to_one_thread_and_set_free_again() -> None:
    def threads() -> dict[str, int]:
        return {
            i["filepath"]: i["num_threads"] for i in threadpool_info() if i["user_api"] == "blas"
        }

    before = threads()
    with one_blas_thread():
        assert set(threads().values()) <= {1}
    assert threads() == before
