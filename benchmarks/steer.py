"""How much of `generate`'s speed is left under interventions.

    python benchmarks/steer.py                      # 12 layers, d 512, batch 16, 64 tokens
    python benchmarks/steer.py --model mlx-community/Qwen3-0.6B-bf16

Equality first: changes that change nothing (a sum with scale 0, a projection and a flip with alpha
0, a condition that nobody meets) give the tokens of plain generation, and ablation, its run-time
plan and the cut weights give the same logits. Then the ways take turns, and the fastest run of each
counts. Start it on an idle machine.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from typing import Any

import vauban  # before mlx: it opens OpenBLAS on Linux

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np
from collect import Numbers, chat_prompts, random_model, random_prompts

from vauban.generation import generate_tokens
from vauban.interventions import Ablate, Add, Conditional, Flip, Intervention, Project
from vauban.models import anatomy
from vauban.models.anatomy import is_half
from vauban.models.parity import relative_difference

WANTED = 0.80


def changes(
    plan: vauban.EditPlan, direction: mx.array, layers: int
) -> dict[str, tuple[Intervention, ...]]:
    """What is timed, all at every token and, where they have a scope, at all blocks."""
    unit = direction / mx.linalg.norm(direction)
    return {
        "Ablate, all sites": (Ablate(direction),),
        "Project, alpha 1": (Project(direction),),
        "Flip about a midpoint": (Flip(direction, midpoint=0.1 * unit),),
        "Add at the middle residual": (Add(direction, 0.1, layers // 2),),
        "Conditional ablation, met": (Conditional(unit, -1.0, Ablate(direction), layer=1),),
        "Conditional ablation, not met": (Conditional(unit, 1.0, Ablate(direction), layer=1),),
        "plan_cut(...).virtual()": plan.virtual(),
    }


def neutral(direction: mx.array, layers: int) -> dict[str, tuple[Intervention, ...]]:
    """Changes after which every token has to be what it was."""
    return {
        "Add, scale 0": (Add(direction, 0.0, layers // 2),),
        "Project, alpha 0": (Project(direction, 0.0),),
        "Flip, alpha 0": (Flip(direction, alpha=0.0),),
        "Conditional, not met": (Conditional(direction, 1.0, Ablate(direction), layer=1),),
    }


def differences(
    model: nn.Module, plan: vauban.EditPlan, direction: mx.array, tokens: list[list[int]]
) -> dict[str, float]:
    """Largest difference of the logits from ablation's, relative to the largest logit."""
    row = mx.array([tokens[0]])
    expected = vauban.forward(model, row, interventions=(Ablate(direction),)).logits
    cut = vauban.forward(plan.apply(copy.deepcopy(model), "float"), row).logits
    virtual = vauban.forward(model, row, interventions=plan.virtual()).logits
    assert expected is not None and cut is not None and virtual is not None
    return {
        "the plan at run time": relative_difference(virtual, expected),
        "the cut weights": relative_difference(cut, expected),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub name; default a random model")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*no chat template.*")
    tokenizer: Any
    if options.model:
        model, tokenizer = vauban.load(options.model)
        prompts = chat_prompts(options.batch)
    else:
        model, tokenizer = random_model(options.layers, options.width, 4096), Numbers()
        prompts = random_prompts(options.batch, 4096)
    tokens = [vauban.encode_chat(tokenizer, prompt) for prompt in prompts]
    layers = len(model.layers)
    width = anatomy(model).d_model
    direction = mx.random.normal((width,), key=mx.random.key(1))
    plan = vauban.plan_cut(model, direction)

    def answers(interventions: tuple[Intervention, ...] = ()) -> list[list[int]]:
        # No token ends an answer, so that all ways decode the same number.
        return generate_tokens(
            model, tokens, eos=frozenset(), max_tokens=options.max_tokens,
            interventions=interventions, batch_size=options.batch,
        )  # fmt: skip

    plain = answers()
    for name, change in neutral(direction, layers).items():
        if answers(change) != plain:
            raise SystemExit(f"{name}: other tokens than without it; the times would mean nothing")
    half = is_half(anatomy(model))
    for name, value in differences(model, plan, direction, tokens).items():
        print(f"{name} and ablation: logits differ by {value:.1e}")
        if value > (2e-2 if half else 1e-4):
            raise SystemExit(f"{name} is not ablation; the times would mean nothing")

    ways: dict[str, tuple[Intervention, ...]] = {
        "without": (),
        **changes(plan, direction, layers),
    }
    best = {name: np.array([np.inf, np.inf]) for name in ways}
    for _ in range(options.repeats):
        for name, change in ways.items():
            start = time.perf_counter(), time.process_time()
            answers(change)
            spent = time.perf_counter() - start[0], time.process_time() - start[1]
            best[name] = np.minimum(best[name], spent)
    count = len(tokens) * options.max_tokens
    print(f"{len(tokens)} answers of {options.max_tokens} tokens, {layers} layers, d {width}")
    print("                                  tokens/s  of plain speed: by wall   by CPU")
    missed = []
    for name, spent in best.items():
        wall, cpu = best["without"] / spent
        print(f"{name:32} {count / spent[0]:9.0f} {wall:23.0%} {cpu:9.0%}")
        if max(wall, cpu) < WANTED:
            missed.append(f"{name}: {wall:.0%} of plain speed; {WANTED:.0%} wanted")
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
