"""How many cuts a minute a search tries, and where its time goes.

    python benchmarks/search.py                       # the dense organism, 40 trials
    python benchmarks/search.py --model MODEL --trials 20

Every stage is timed by the search itself. The front and the best cut are printed first, so that the
speed belongs to a search that finds something.
"""

from __future__ import annotations

# isort: off
import vauban  # before mlx.core

# isort: on
import argparse
import time

from vauban.prompts import measuring_paths
from vauban.search import search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(vauban.organism_path("dense")))
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=128, help="measuring prompts of each class")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, tokenizer = vauban.load(args.model)
    files = measuring_paths(args.model)
    harmful, harmless = (vauban.load_prompts(file)[: args.prompts] for file in files)
    wall, cpu = time.perf_counter(), time.process_time()
    result = search(model, tokenizer, harmful, harmless, trials=args.trials, seed=args.seed)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(result.summary())
    if not result.trials:
        return
    print(f"best: {result.best().summary()}")
    spent = dict(result.seconds)
    before = sum(spent.pop(name) for name in ("prepare", "directions", "known cuts"))
    in_trials = wall - before
    pruned = sum(trial.state == "pruned" for trial in result.trials)
    answered = sum(trial.prompts for trial in result.trials)
    print(
        f"\n{len(result.trials)} trials ({pruned} stopped early, {answered} harmful answers) in "
        f"{wall:.1f} s wall, {cpu:.1f} s CPU; {60 * len(result.trials) / in_trials:.1f} trials a "
        "minute once the known cuts are chosen"
    )
    print(f"{'stage':<14} {'wall s':>8} {'share':>7}")
    for name, seconds in sorted(result.seconds.items(), key=lambda item: -item[1]):
        print(f"{name:<14} {seconds:8.1f} {seconds / wall:7.1%}")


if __name__ == "__main__":
    main()
