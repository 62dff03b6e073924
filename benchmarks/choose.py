"""What each way of choosing a direction leaves: auto, causal, answers.

    python benchmarks/choose.py                     # the bundled organisms
    python benchmarks/choose.py MODEL --prompts 64  # a model of yours, on the bundled prompts

Each choice is cut with alpha 1 everywhere, the embedding as `embedding="auto"` has it, at run time;
answers and KL are on held-out prompts. Seconds are those of `vauban.measure`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import vauban  # before mlx: OpenBLAS

# isort: split
from vauban.config import make_config
from vauban.pipeline.prompt_sets import eval_set, prompt_set

CHOICES = ("auto", "causal", "answers")
POSITIONS = {"causal": "post_instruction", "answers": "post_instruction"}


def compare(path: str, prompts: int, tokens: int) -> None:
    """Print one line per way of choosing."""
    config = make_config({("model", "path"): path, ("eval", "num_prompts"): prompts})
    model, tokenizer = vauban.load(path)
    folder = Path(path) if Path(path).exists() else None
    harmful, harmless = (
        list(prompt_set(config, label, folder).prompts) for label in ("harmful", "harmless")
    )
    held_out = eval_set(config, folder)
    print(f"{Path(path).name}: {len(harmful)} + {len(harmless)} prompts to measure on", flush=True)
    for choice in CHOICES:
        started = time.perf_counter()
        result = vauban.measure(
            model, tokenizer, harmful, harmless, layer=choice, positions=POSITIONS.get(choice)
        )
        seconds = time.perf_counter() - started
        plan = vauban.plan_cut(model, result)
        found = vauban.evaluate(
            model, plan, tokenizer, held_out.texts("harmful"), max_tokens=tokens,
            harmless=held_out.texts("harmless"),
        )  # fmt: skip
        before, after = (
            f"{rate:.1%}" if rate is not None else "-"
            for rate in (found.refusal_rate_original, found.refusal_rate_modified)
        )
        over = found.over_refusal_modified
        print(
            f"  {choice:8} residual {result.residual_index:2}, position {result.position:2}: "
            f"refused {before} -> {after}, harmless {'-' if over is None else f'{over:.1%}'}, "
            f"KL {found.kl_divergence:.4f}, {seconds:.1f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="folders or Hub ids (default: the organisms)")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts of each class")
    parser.add_argument("--tokens", type=int, default=40, help="longest answer")
    options = parser.parse_args()
    organisms = [str(vauban.organism_path(name)) for name in ("dense", "moe", "4bit")]
    for path in options.models or organisms:
        compare(path, options.prompts, options.tokens)


if __name__ == "__main__":
    main()
