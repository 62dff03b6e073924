"""How near calibrated rounding comes to the float cut, over several calibrations of the organism.

Prints the KL to the float cut of the same packed model as a share of naive requantization's: of the
first answer token to held-out harmful prompts and to harmless ones (at the prompt's last position,
where directions are selected by it), and of all answer tokens to both; the mean over calibrations,
and the first token's least and most. One calibration is an accident: a few undecided prompts make
half of the first figure. Packed weights are judged as floats with the same numbers, which a CPU
multiplies faster.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial

import vauban  # before mlx: OpenBLAS

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from organism import CALIBRATE, cut_float, cut_naive, packed

from vauban.edits.modules import float_module
from vauban.evaluation.behaviour import answer_tokens, judge_answers
from vauban.evaluation.likelihood import compare_sequences as compare
from vauban.evaluation.sequences import Scored, with_answers
from vauban.generation import decode


def as_floats(model: nn.Module) -> nn.Module:
    """The same numbers unpacked."""
    twin = copy.deepcopy(model)
    modules = [(p, float_module(m)) for p, m in twin.named_modules() if "scales" in m]
    twin.update_modules(tree_unflatten(modules))
    mx.eval(twin.parameters())
    return twin


def main() -> None:
    """Every calibration at each width."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--writers", action="store_true", help="leave the embedding alone")
    options = parser.parse_args()
    folder = vauban.organism_path("dense")
    model, tokenizer = vauban.load(folder)
    sets = [vauban.load_prompts(folder / f"prompts/{n}.jsonl") for n in ("harmful", "harmless")]
    rows = vauban.load_labelled_prompts(folder / "prompts/eval.jsonl")
    prompts = [r.prompt for r in rows if r.label == "harmful"]
    harmless = [r.prompt for r in rows if r.label == "harmless"][::4]
    direction = vauban.measure(model, tokenizer, *sets)
    heads = ("KL: first", "least", "most", "harmless", "answers", "harmless")
    print(f"{'':24}" + "".join(f"{head:>10}" for head in heads) + "  refused")
    for bits in options.bits:
        narrow = packed(model, bits)
        embedding = False if options.writers else "auto"
        plan = vauban.plan_cut(as_floats(narrow), direction, embedding=embedding)
        reference = as_floats(cut_float(narrow, plan))
        answers = [
            answer_tokens(reference, tokenizer, t, max_tokens=40) for t in (prompts, harmless)
        ]
        asked, benign = map(partial(with_answers, tokenizer), (prompts, harmless), answers)
        first = [
            [Scored(s.ids[: s.start + 1], s.start) for s in texts] for texts in (asked, benign)
        ]
        scored = (*first, asked, benign)
        naive = as_floats(cut_naive(narrow, plan))
        whole = np.array([compare(reference, naive, s).kl for s in scored])
        print(f"{bits}-bit naive, KL itself   {whole.round(4)}")
        parts = [slice(i, i + CALIBRATE) for i in range(0, len(sets[0]), CALIBRATE)]
        seeds = range(options.seeds)
        for name, plans in (
            ("two-sided", (plan for _ in range(1))),
            (
                "calibrated",
                (
                    plan.calibrated(tokenizer, sets[0][part] + sets[1][part], seed=seed)
                    for seed in seeds
                    for part in parts
                ),
            ),
            ("random tokens", (plan.calibrated(seed=seed) for seed in seeds)),
        ):
            shares, refused = [], []
            for own in plans:
                changed = as_floats(own.apply(copy.deepcopy(narrow), calibrate=False))
                shares.append([compare(reference, changed, s).kl for s in scored] / whole)
                ids = answer_tokens(changed, tokenizer, prompts, max_tokens=40)
                refused.append(judge_answers(prompts, [decode(tokenizer, i) for i in ids]).rate)
            decided, calm, later, other = np.mean(shares, axis=0)
            every = np.array(shares)[:, 0]
            print(
                f"{bits}-bit {name:18}{decided:>10.2f}{every.min():>10.2f}{every.max():>10.2f}"
                f"{calm:>10.2f}{later:>10.2f}{other:>10.2f}  {min(refused):.3f} to "
                f"{max(refused):.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
