"""Paired tests: SciPy's exact test, brute-force enumeration, and coverage summed exactly."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest

from vauban.errors import InputError
from vauban.evaluation.pairs import paired_test


def _pairs(only_before: int, only_after: int, both: int = 0, neither: int = 0):
    before = [True] * only_before + [False] * only_after + [True] * both + [False] * neither
    after = [False] * only_before + [True] * only_after + [True] * both + [False] * neither
    return paired_test(before, after)


@pytest.mark.parametrize(
    ("lost", "gained"), [(0, 0), (0, 1), (5, 0), (3, 3), (1, 7), (12, 2), (40, 61), (900, 1000)]
)
def test_p_value_equals_scipys_exact_binomial_test(lost: int, gained: int) -> None:
    expected = binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    assert _pairs(lost, gained, 4, 9).p_value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("lost", range(5))
def test_p_value_equals_an_enumeration_of_every_exchange(lost: int) -> None:
    """Without a change of rates each changed pair could as well have gone the other way."""
    gained = 8 - lost
    observed = abs(gained - lost)
    exchanges = list(itertools.product((-1, 1), repeat=lost + gained))
    extreme = sum(abs(sum(signs)) >= observed for signs in exchanges)
    assert _pairs(lost, gained, 2, 2).p_value == pytest.approx(extreme / len(exchanges), rel=1e-12)


def test_published_interval_of_the_airway_data() -> None:
    """Fagerland, Lydersen, Laake 2014: 1, 1, 7, 12 of 21 children; Tango: (-0.517, -0.026)."""
    result = _pairs(only_before=7, only_after=1, both=1, neither=12)
    assert result.difference == pytest.approx(-6 / 21)
    assert result.interval == pytest.approx((-0.517, -0.026), abs=5e-4)


@pytest.mark.parametrize(("lost", "gained", "n"), [(0, 0, 20), (7, 1, 21), (3, 9, 40), (20, 0, 20)])
def test_interval_ends_are_where_the_score_test_rejects(lost: int, gained: int, n: int) -> None:
    """The score is computed anew: the nuisance maximises the trinomial likelihood numerically."""

    def score(difference: float) -> float:
        def loss(q: float) -> float:
            cells = (q, q + difference, 1 - 2 * q - difference)
            return -sum(
                count * math.log(max(cell, 1e-300))
                for count, cell in zip((lost, gained, n - lost - gained), cells, strict=True)
                if count
            )

        bounds = (max(0.0, -difference), (1 - difference) / 2)
        q = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        return (gained - lost - n * difference) / math.sqrt(
            n * (2 * q + difference * (1 - difference))
        )

    interval = _pairs(lost, gained, 0, n - lost - gained).interval
    for end in interval:
        if abs(end) < 1:
            assert abs(score(end)) == pytest.approx(1.959964, abs=2e-3)


def test_interval_is_mirrored_when_before_and_after_are_exchanged() -> None:
    one, other = _pairs(6, 2, 5, 17), _pairs(2, 6, 5, 17)
    assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]))
    assert one.p_value == other.p_value


def test_interval_covers_the_true_difference_in_95_percent_of_all_samples() -> None:
    """Summed over every outcome of 30 pairs, so without the noise of a simulation."""
    n = 30
    outcomes = [(b, c) for b in range(n + 1) for c in range(n + 1 - b)]
    intervals = np.array([_pairs(b, c, 0, n - b - c).interval for b, c in outcomes])
    coverages = []
    for lost, gained in [(0.3, 0.05), (0.2, 0.2), (0.6, 0.02), (0.1, 0.15), (0.05, 0.4)]:
        weights = np.array(
            [
                math.comb(n, b)
                * math.comb(n - b, c)
                * lost**b
                * gained**c
                * (1 - lost - gained) ** (n - b - c)
                for b, c in outcomes
            ]
        )
        assert weights.sum() == pytest.approx(1)
        covered = (intervals[:, 0] <= gained - lost) & (gained - lost <= intervals[:, 1])
        coverages.append(float(weights[covered].sum()))
    assert min(coverages) > 0.93
    assert 0.94 < np.mean(coverages) < 0.97


def test_numpy_booleans_are_taken() -> None:
    result = paired_test(np.array([True, False]), np.array([False, False]))  # type: ignore[arg-type]
    assert (result.only_before, result.only_after, result.n) == (1, 0, 2)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ([], [], "0 verdicts before and 0 after"),
        ([True], [True, False], "1 verdicts before and 2 after"),
        ([True, None], [True, True], r"before\[1\] is None"),
        ([True], [1], r"after\[0\] is 1"),
    ],
)
def test_bad_pairs_are_refused_by_name(before: list, after: list, words: str) -> None:
    with pytest.raises(InputError, match=words):
        paired_test(before, after)
