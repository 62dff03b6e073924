"""How long does a map of refusal take, and what does reading and answering in one pass save?

Scans the organism's 144 rows (target: 20 s on two cores), and the same in two passes: answers, then
residuals. Checks that both give the same projections before it times them.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import vauban
from vauban.evaluation import measure_harmfulness, surface_path
from vauban.prompts import instruction_end, measuring_paths

TARGET = 20.0


def timed(run: Callable[[], object], repeats: int) -> float:
    spans = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        spans.append(time.perf_counter() - started)
    return statistics.median(spans)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(vauban.organism_path("dense")))
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model, tokenizer = vauban.load(options.model)
    sets = [vauban.load_prompts(path) for path in measuring_paths(Path(options.model))]
    result = vauban.measure(model, tokenizer, *sets)
    harmfulness = measure_harmfulness(model, tokenizer, *sets, result)
    rows = vauban.load_surface_prompts(surface_path(options.model))
    prompts = [row.prompt for row in rows]

    def scan() -> vauban.SurfaceScan:
        return vauban.scan_surface(
            model, tokenizer, result, rows, harmfulness=harmfulness, max_tokens=options.max_tokens
        )

    def collect() -> np.ndarray:
        positions = (instruction_end(tokenizer), -1)
        collected = vauban.collect_activations(model, tokenizer, prompts, positions=positions)
        return np.array(collected.values[:, result.residual_index, 1] @ result.direction)

    def answer() -> list[str]:
        return vauban.generate(model, tokenizer, prompts, max_tokens=options.max_tokens)

    one = scan()
    difference = float(np.abs(collect() - [point.refusal for point in one.points]).max())
    print(one.summary())
    print(f"largest difference of a projection from a pass of its own: {difference:.1e}")
    span, passes = timed(scan, options.repeats), timed(answer, options.repeats)
    extra = timed(collect, options.repeats)
    print(f"{len(rows)} rows, {options.max_tokens} tokens: {span:.1f} s (target: {TARGET:.0f} s)")
    print(f"in two passes: {passes:.1f} s to answer, {extra:.1f} s to read")


if __name__ == "__main__":
    main()
