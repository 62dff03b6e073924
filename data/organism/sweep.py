"""Knows how to ask every residual of the dense organism for all lines at once.

Knows no training. The pipeline's own choice has to be a residual that meets them:
    python data/organism/sweep.py [--model FOLDER] [--sample N]
"""

import argparse
import json
from pathlib import Path

import vauban

# isort: split
from evaluate import HERE, Bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE / "dense")
    parser.add_argument("--sample", type=int, help="rows of each kind")
    arguments = parser.parse_args()
    seed = json.loads((arguments.model / "vauban.json").read_text())["seed"]
    bench = Bench(arguments.model, arguments.sample)
    data = (bench.model, bench.tokenizer, bench.harmful, bench.harmless)
    chosen = vauban.measure(*data)
    depth = len(bench.model.layers)
    print(f"residual {chosen.residual_index} is chosen among 1 to {int(0.8 * depth)}")
    for residual in range(1, depth):
        result = vauban.measure(*data, layer=residual - 1)
        lines = bench.lines(result, seed)
        if residual == 1:
            print("residual | Cohen's d | " + " | ".join(line.name for line in lines) + " | all")
            print("target | | " + " | ".join(line.target for line in lines) + " |")
        cells = " | ".join(f"{line.measured:.3f}" for line in lines)
        met = "yes" if all(line.met() for line in lines) else "no"
        print(f"{residual} | {result.scores['cohens_d'][residual - 1]:.2f} | {cells} | {met}")


if __name__ == "__main__":
    main()
