"""Rows of a table: exact along the direction, and cheap where they matter."""

from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rounding.drawn import error, matrix
from vauban.rounding import Energy, Problem, round_table
from vauban.rounding.grid import FLOAT_MODES


def sensitivity(width: int, rank: int = 12) -> Energy:
    """Few directions matter much, as in a trained model."""
    factor = np.random.default_rng(1).normal(size=(rank, width)) / np.arange(1, rank + 1)[:, None]
    return Energy(factor.astype(np.float32), np.full(width, 1e-3, np.float32), 100)


def loss(asked: Problem, codes: np.ndarray, energy: Energy) -> float:
    """Σ e M eᵀ with M written out."""
    m = energy.factor.T.astype(np.float64) @ energy.factor + np.diag(energy.rest)
    e = error(asked, codes)
    return float(np.einsum("ij,jk,ik->", e, m, e))


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
    asked, had = matrix(
        rows, 256, k=k, bits=bits, group=group, mode=mode, alpha=alpha, seed=seed, axis="input"
    )
    energy = sensitivity(256)
    plain, weighed = round_table(asked), round_table(asked, energy)
    for codes in (plain, weighed):
        assert codes.dtype == np.uint8 and codes.max() <= asked.grid.top
        off = error(asked, codes) @ asked.basis.T
        assert np.linalg.norm(off) <= 1e-3 * max(np.linalg.norm(had), 0.01 * np.sqrt(rows))
    if rows >= 16:
        # Of one row nothing is promised: plain rounding may be lucky.
        assert loss(asked, weighed, energy) <= loss(asked, plain, energy)


def test_what_does_not_matter_is_what_moves() -> None:
    """A fifth of plain exact rounding's loss where twelve directions of 256 carry all of it."""
    asked, _ = matrix(200, 256, axis="input")
    energy = sensitivity(256)
    weighed, plain = round_table(asked, energy), round_table(asked)
    assert loss(asked, weighed, energy) <= 0.2 * loss(asked, plain, energy)


def test_rows_whose_directions_matter_alike_cost_as_much_as_plain_rounding() -> None:
    asked, _ = matrix(200, 256, axis="input")
    white = Energy(np.zeros((1, 256), np.float32), np.ones(256, np.float32), 1)
    weighed, plain = (np.linalg.norm(error(asked, round_table(asked, e))) for e in (white, None))
    assert weighed <= 1.05 * plain


def test_groups_without_steps() -> None:
    """Constant rows keep what they hold; nothing is divided by zero."""
    asked, _ = matrix(4, 128, axis="input")
    asked.steps[0] = 0.0
    for energy in (None, sensitivity(128)):
        off = error(asked, round_table(asked, energy))
        assert np.isfinite(off).all()
        assert np.abs(off[1:] @ asked.basis.T).max() <= 1e-3
