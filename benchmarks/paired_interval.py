"""How often the interval of a paired difference holds the true one, over every outcome.

No outcome is drawn: for n pairs all counts of lost and gained pairs are listed, and the
probability of those whose interval holds the true difference is summed. Prints the least and the
mean coverage on a grid of true rates, beside Wald's interval.
"""

from __future__ import annotations

import argparse
import math

import numpy as np

from vauban.evaluation.pairs import paired_test

GRID = (0.02, 0.05, 0.1, 0.2, 0.3, 0.45)


def wald(gained: int, lost: int, n: int) -> tuple[float, float]:
    """The textbook interval: the estimate and 1.96 standard errors."""
    estimate = (gained - lost) / n
    half = 1.96 * math.sqrt(max(gained + lost - (gained - lost) ** 2 / n, 0.0)) / n
    return estimate - half, estimate + half


def log_probabilities(outcomes: np.ndarray, n: int, gained: float, lost: float) -> np.ndarray:
    """(k,) log probabilities of (gained, lost) counts in n pairs."""
    factorials = np.array([math.lgamma(i + 1) for i in range(n + 1)])
    rest = n - outcomes.sum(1)
    ways = factorials[n] - factorials[outcomes].sum(1) - factorials[rest]
    logs = np.log([gained, lost, 1 - gained - lost])
    return ways + np.column_stack([outcomes, rest]) @ logs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[16, 32, 64, 128])
    options = parser.parse_args()
    rates = [(g, b) for g in GRID for b in GRID if g + b < 1]
    for n in options.pairs:
        outcomes = np.array([(g, b) for g in range(n + 1) for b in range(n + 1 - g)])
        score = np.array(
            [
                paired_test(
                    [True] * b + [False] * (n - b), [False] * b + [True] * g + [False] * (n - b - g)
                ).interval
                for g, b in outcomes
            ]
        )
        for name, intervals in (
            ("score", score),
            ("Wald", np.array([wald(g, b, n) for g, b in outcomes])),
        ):
            coverages = []
            for gained, lost in rates:
                weights = np.exp(log_probabilities(outcomes, n, gained, lost))
                true = gained - lost
                holds = (intervals[:, 0] <= true) & (true <= intervals[:, 1])
                coverages.append(float(weights[holds].sum()))
            print(
                f"{n:4} pairs, {name:5}: coverage at least {min(coverages):.3f}, "
                f"mean {np.mean(coverages):.3f} over {len(rates)} pairs of rates"
            )


if __name__ == "__main__":
    main()
