"""Writes selection.json: made-up score files in the form of Arditi et al.'s released runs.

The numbers are random with a planted shape (a middle layer removes and induces refusal). Ties,
boundary values and rows that fail exactly one filter are put in by hand.
"""

import json
from pathlib import Path

import numpy as np

RUNS = {"small": (5, 10), "deep": (6, 32), "odd": (3, 7)}


def rows(positions: int, layers: int, seed: int) -> list[dict[str, float]]:
    rng = np.random.default_rng(seed)
    found = []
    for position in range(-positions, 0):
        for layer in range(layers):
            strength = np.exp(-(((layer / layers - 0.55) / 0.15) ** 2)) * rng.uniform(0.2, 1.0)
            found.append(
                {
                    "position": position,
                    "layer": layer,
                    "refusal_score": round(6 - 18 * strength + rng.normal(), 4),
                    "steering_score": round(-12 + 20 * strength + rng.normal(), 4),
                    "kl_div_score": round(abs(rng.normal(0.06, 0.05)), 4),
                }
            )
    return found


def main() -> None:
    runs = {}
    for seed, (name, (positions, layers)) in enumerate(RUNS.items()):
        table = rows(positions, layers, seed)
        limit = int(layers * 0.8)
        best = {"refusal_score": -30.0, "steering_score": 5.0, "kl_div_score": 0.01}
        # Each of these would win, and fails one filter.
        table[limit] |= best
        table[1] |= {**best, "kl_div_score": 0.1001}
        table[2] |= {**best, "steering_score": -0.0001}
        # On the boundary both are kept; the later of two equal scores loses.
        table[limit - 1] |= {"refusal_score": -20.0, "steering_score": 0.0, "kl_div_score": 0.1}
        table[layers + 3] |= {"refusal_score": -20.0, "steering_score": 3.0, "kl_div_score": 0.02}
        runs[name] = {"layers": layers, "winner": [-positions, limit - 1], "rows": table}
    Path(__file__).with_name("selection.json").write_text(json.dumps(runs, indent=0) + "\n")


if __name__ == "__main__":
    main()
