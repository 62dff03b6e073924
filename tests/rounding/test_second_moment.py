"""The sketch of a matrix's inputs: what it keeps exactly, and how far off the rest may be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vauban.errors import InputError
from vauban.rounding import InputMoments


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 400), size=st.integers(1, 40), rank=st.integers(1, 50),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_sketch_keeps_every_coordinates_energy(
    rows: int, size: int, rank: int, seed: int
) -> None:
    """Frequent Directions: ‖XᵀX - BᵀB‖ <= ‖X‖²/rank; the rest makes the diagonal exact."""
    x = np.random.default_rng(seed).normal(size=(rows, size)).astype(np.float32)
    moments = InputMoments(size, rank)
    for part in np.array_split(x, 3):
        moments.update(part)
    energy = moments.energy()
    exact = x.T.astype(np.float64) @ x / rows
    sketch = energy.factor.T.astype(np.float64) @ energy.factor
    assert energy.rows == rows and len(energy.factor) <= max(rank, 1)
    assert np.allclose(np.diag(sketch) + energy.rest, np.diag(exact), rtol=1e-4, atol=1e-6)
    assert np.linalg.norm(exact - sketch, 2) <= np.trace(exact) / rank + 1e-5
    if rank >= size:
        assert np.allclose(sketch, exact, atol=1e-4 * max(1.0, np.abs(exact).max()))
    assert energy.mean == pytest.approx(np.trace(exact) / size, rel=1e-4)


def test_moments_refuse_what_they_cannot_take() -> None:
    with pytest.raises(InputError, match=r"expected \(n, 4\)"):
        InputMoments(4, 2).update(np.zeros((3, 5), np.float32))
    with pytest.raises(InputError, match="NaN or inf"):
        InputMoments(4, 2).update(np.full((1, 4), np.nan, np.float32))
    with pytest.raises(InputError, match="no inputs"):
        InputMoments(4, 2).energy()
    with pytest.raises(InputError, match="rank is 0"):
        InputMoments(4, 0)
