"""What is saved by several cuts in one batch, a head at the ends, and places that are taken again.

    python benchmarks/together.py                       # the dense organism
    python benchmarks/together.py --model Qwen/Qwen2.5-Coder-0.5B-Instruct

Equality first: the answers under every cut are those that it gives alone. The fastest run of each
way counts; beside the times stand the decoding steps, which decide where a step reads all weights
for however few rows (a GPU, a Mac). Of the logits behind prompts the ratio is that of the head at
every token to the head at the ends. Places: 64 harmful and 64 harmless prompts, `--rows` at a time,
one batch after the other and with a waiting prompt in the place of every answer that has ended.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import vauban  # before mlx: it opens OpenBLAS on Linux

import mlx.core as mx  # isort: skip

from vauban.evaluation import answer_groups
from vauban.generation import eos_ids, generate_tokens
from vauban.models import anatomy
from vauban.models.swap import around, swapped
from vauban.prompts import default_prompt_paths, encode_chat

CUTS, PROMPTS, TOKENS, REPEATS = 6, 8, 24, 3
WAITING, LONG = 64, 100


def seconds(work: Callable[[], Any], repeats: int = REPEATS) -> tuple[float, float]:
    """(wall, processor time) of the fastest of some runs."""
    best = (float("inf"), float("inf"))
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        work()
        best = min(best, (time.perf_counter() - wall, time.process_time() - processor))
    return best


def show(names: Sequence[str], steps: Sequence[int], times: Sequence[tuple[float, float]]) -> None:
    """A line for each of two ways, and one of their ratios."""
    for name, count, (wall, processor) in zip(names, steps, times, strict=True):
        print(f"  {name:28} {count:7} {wall:8.2f} {processor:8.2f}")
    ratios = [a / b for a, b in zip(*times, strict=True)]
    print(f"  ratio {steps[0] / steps[1]:30.2f} {ratios[0]:8.2f} {ratios[1]:8.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default=str(vauban.organism_path("dense")))
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16, 32])
    arguments = parser.parse_args()
    model, tokenizer = vauban.load(arguments.model)
    width = vauban.describe(model).d_model
    prompts = vauban.load_prompts(default_prompt_paths()[0])[:PROMPTS]
    directions = mx.random.normal((CUTS, width), key=mx.random.key(0))
    cuts = [vauban.plan_cut(model, direction).virtual() for direction in directions]
    options = {"max_tokens": TOKENS}

    def alone() -> list[Any]:
        return [answer_groups(model, tokenizer, [(cut, prompts)], **options)[0] for cut in cuts]

    def together() -> list[Any]:
        return answer_groups(model, tokenizer, [(cut, prompts) for cut in cuts], **options)

    one, other = alone(), together()
    same = sum(a == b for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))
    print(f"equal answers: {same} of {CUTS * PROMPTS}")
    steps = [sum(max(map(len, answers)) for answers in one), max(len(a) for x in other for a in x)]
    times = [seconds(work) for work in (alone, together)]
    print(f"{CUTS} cuts x {PROMPTS} prompts x {TOKENS} tokens   steps   wall s   processor s")
    show(("one by one", "together"), steps, times)

    rows = [encode_chat(tokenizer, prompt) for prompt in prompts]
    tokens = mx.array([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])
    lengths = [len(row) for row in rows]

    def read(logits: Any) -> mx.array:
        out = vauban.forward(model, tokens, lengths=lengths, positions=None, logits=logits)
        assert out.logits is not None
        mx.eval(out.logits)
        return out.logits

    ends = mx.array([n - 1 for n in lengths])[:, None, None]
    every = mx.take_along_axis(read(True), ends, axis=1)
    difference = float(mx.abs(every - read("last")).max() / mx.abs(every).max())
    print(f"logits of the ends: relative difference {difference:.1e}")
    head = [seconds(lambda kind=kind: read(kind)) for kind in (True, "last")]
    print(f"  reading {PROMPTS} prompts, processor s: {head[0][1]:.2f} with the head everywhere, "
          f"{head[1][1]:.2f} at the ends; ratio {head[0][1] / head[1][1]:.2f}")  # fmt: skip
    equal = all([places(model, tokenizer, rows) for rows in arguments.rows])
    return 0 if same == CUTS * PROMPTS and difference < 1e-4 and equal else 1


def places(model: Any, tokenizer: Any, rows: int) -> bool:
    """Prints steps and seconds of both ways; whether the answers are the same."""
    texts = [
        text for path in default_prompt_paths() for text in vauban.load_prompts(path)[:WAITING]
    ]
    prompts = sorted((encode_chat(tokenizer, text) for text in texts), key=len, reverse=True)
    chunks = [prompts[start : start + rows] for start in range(0, len(prompts), rows)]
    options: dict[str, Any] = {"eos": eos_ids(tokenizer), "max_tokens": LONG, "batch_size": rows}
    steps: list[int] = []

    def counted(inner: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        steps[-1] += x.shape[1] == 1
        return inner(x, *args, **kwargs)

    def one_batch_after_the_other() -> list[list[int]]:
        return [answer for chunk in chunks for answer in generate_tokens(model, chunk, **options)]

    def taken_again() -> list[list[int]]:
        return generate_tokens(model, prompts, **options)

    generate_tokens(model, prompts[: rows + 1], **{**options, "max_tokens": 1})  # checks, once
    found: list[list[list[int]]] = []
    times = []
    with swapped([around(anatomy(model).layers[0], counted)]):
        for way in (one_batch_after_the_other, taken_again):
            steps.append(0)
            times.append(seconds(lambda way=way: found.append(way()), 1))
    same = sum(a == b for a, b in zip(*found, strict=True))
    print(f"places, {len(prompts)} prompts x {LONG} tokens, {rows} rows: equal answers {same}")
    show(("one batch after the other", "taken again"), steps, times)
    return same == len(prompts)


if __name__ == "__main__":
    sys.exit(main())
