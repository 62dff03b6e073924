"""Singular values, rank above rounding, shared directions: against NumPy's own SVD."""

from collections.abc import Iterator

import numpy as np
import pytest

from vauban.comparison.changes import (
    Noise,
    leading_spectrum,
    numerical_rank,
    rank_of_share,
    shared_directions,
    strength_of_cut,
)

RNG = np.random.default_rng(5)


def in_blocks(matrix: np.ndarray, step: int = 37):
    def blocks() -> Iterator[tuple[slice, np.ndarray]]:
        for start in range(0, len(matrix), step):
            rows = slice(start, min(start + step, len(matrix)))
            yield rows, matrix[rows]

    return blocks


def low_rank(m: int, n: int, values: list[float], noise: float) -> np.ndarray:
    left = np.linalg.qr(RNG.standard_normal((m, len(values))))[0]
    right = np.linalg.qr(RNG.standard_normal((n, len(values))))[0]
    return ((left * values) @ right.T + noise * RNG.standard_normal((m, n))).astype(np.float32)


@pytest.mark.parametrize("shape", [(200, 310), (310, 90), (24, 500)])
def test_singular_values_over_rounding_are_those_of_numpy(shape: tuple[int, int]) -> None:
    matrix = low_rank(*shape, [3.0, 2.0, 0.7], 1e-3)
    exact = np.linalg.svd(matrix.astype(np.float64))
    found = leading_spectrum(in_blocks(matrix), shape)
    assert np.allclose(found.values[:3], exact[1][:3], rtol=1e-2)
    for i in range(3):
        assert abs(found.left[i] @ exact[0][:, i]) > 0.999
        assert abs(found.right[i] @ exact[2][i]) > 0.999


def test_values_of_a_flat_spectrum_are_at_most_a_fifth_too_small() -> None:
    matrix = RNG.standard_normal((300, 400)).astype(np.float32)
    exact = np.linalg.svd(matrix, compute_uv=False)[:32]
    found = leading_spectrum(in_blocks(matrix), matrix.shape).values
    assert (found <= exact * 1.0001).all() and (found >= 0.8 * exact).all()


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_rank_is_counted_above_rounding(rank: int) -> None:
    shape, sigma = (180, 260), 1e-3
    matrix = low_rank(*shape, [1.0, 0.6, 0.3][:rank], sigma)
    noise = Noise.of(np.full(180, 260 * sigma**2), np.full(260, 180 * sigma**2))
    energy = float((matrix.astype(np.float64) ** 2).sum())
    assert numerical_rank(leading_spectrum(in_blocks(matrix), shape), energy, noise) == (rank, True)


def test_noise_above_rounding_is_no_low_rank_change() -> None:
    matrix = 0.01 * RNG.standard_normal((180, 260)).astype(np.float32)
    noise = Noise.of(np.full(180, 260e-8), np.full(260, 180e-8))
    energy = float((matrix.astype(np.float64) ** 2).sum())
    spectrum = leading_spectrum(in_blocks(matrix), matrix.shape)
    assert numerical_rank(spectrum, energy, noise) == (32, False)
    assert rank_of_share(spectrum, energy) is None


def test_a_shared_direction_is_seen_through_its_sign_and_among_others() -> None:
    u = np.linalg.qr(RNG.standard_normal((128, 1)))[0].T
    noisy = [s * (u + 0.02 * RNG.standard_normal((1, 128))) for s in (1, -1, 1, -1)]
    alone = list(RNG.standard_normal((6, 1, 128)))
    bases = [b / np.linalg.norm(b) for b in (*alone[:3], *noisy, *alone[3:])]
    shared = shared_directions(bases)
    assert shared is not None and shared.members == (3, 4, 5, 6)
    assert shared.directions.shape == (1, 128) and abs(shared.directions[0] @ u[0]) > 0.98


def test_a_shared_plane_has_two_directions_in_any_mixture() -> None:
    plane = np.linalg.qr(RNG.standard_normal((96, 2)))[0].T
    turns = [np.linalg.qr(RNG.standard_normal((2, 2)))[0] for _ in range(5)]
    shared = shared_directions([turn @ plane for turn in turns])
    assert shared is not None and shared.members == (0, 1, 2, 3, 4)
    assert np.allclose(shared.directions.T @ shared.directions, plane.T @ plane, atol=1e-9)


def test_random_spans_share_nothing() -> None:
    bases = [np.linalg.qr(RNG.standard_normal((64, 4)))[0].T for _ in range(8)]
    assert shared_directions(bases) is None
    assert shared_directions(bases[:2]) is None and shared_directions(bases[:1]) is None


def test_a_cut_takes_a_multiple_of_what_was_there() -> None:
    had = RNG.standard_normal(500)
    strength, alignment = strength_of_cut(0.3 * had, had)
    assert strength == pytest.approx(0.3) and alignment == pytest.approx(1.0)
    assert abs(strength_of_cut(RNG.standard_normal(500), had)[1]) < 0.2
