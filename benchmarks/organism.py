"""What packing does to a cut: the organism cut in float, exactly and naively at 3 and 4 bits.

Prints refusals and compliances on held-out harmful prompts and the KL to the float cut of the same
packed model: of the first answer token to those prompts, where the model decides whether to refuse,
and of all answer tokens, to them and to harmless ones. "naive, projected" is naive requantization
with what it leaves of the direction taken out at run time: its rounding noise alone. "calibrated"
is two-sided rounding for what the matrices read on 64 measuring prompts, as `vauban MODEL` does it.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import vauban  # before mlx: OpenBLAS

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from vauban.edits.modules import module_weight, repacked_module
from vauban.evaluation.behaviour import answer_tokens, judge_answers
from vauban.evaluation.likelihood import compare_sequences as compare
from vauban.evaluation.sequences import Scored, with_answers
from vauban.generation import decode

# Of the harmful and of the harmless measuring prompts each: what a run takes.
CALIBRATE = 64


def packed(model: nn.Module, bits: int) -> nn.Module:
    """A copy of the model packed with group 64."""
    twin = copy.deepcopy(model)
    nn.quantize(twin, group_size=64, bits=bits)
    mx.eval(twin.parameters())
    return twin


def cut_float(model: nn.Module, plan: vauban.EditPlan) -> nn.Module:
    """Edited modules in float."""
    return plan.apply(copy.deepcopy(model), "float")


def cut_naive(model: nn.Module, plan: vauban.EditPlan) -> nn.Module:
    """Dequantize, cut, quantize again with fresh scales: what other tools do."""
    twin = copy.deepcopy(model)
    plan.apply(twin, "float")
    modules = dict(twin.named_modules())
    for update in plan.updates:
        module = modules[update.path]
        old = dict(model.named_modules())[update.path]
        q, s, b = mx.quantize(module_weight(module), group_size=64, bits=old.bits)
        arrays = {"weight": q, "scales": s, "biases": b}
        again = repacked_module(old, arrays, old.bits, 64, "affine")
        twin.update_modules(tree_unflatten([(update.path, again)]))
    return twin


def main() -> None:
    """Cut three ways at each width and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=160)
    options = parser.parse_args()
    folder = vauban.organism_path("dense")
    model, tokenizer = vauban.load(folder)
    sets = [vauban.load_prompts(folder / f"prompts/{n}.jsonl") for n in ("harmful", "harmless")]
    rows = vauban.load_labelled_prompts(folder / "prompts/eval.jsonl")
    harmful = [r for r in rows if r.label == "harmful"][: options.prompts]
    prompts = [r.prompt for r in harmful]
    harmless = [r.prompt for r in rows if r.label == "harmless"][::4]
    direction = vauban.measure(model, tokenizer, *sets)

    def judge(changed: Any) -> tuple[float, float]:
        ids = answer_tokens(changed, tokenizer, prompts, max_tokens=40)
        answers = [decode(tokenizer, i) for i in ids]
        pairs = zip(answers, harmful, strict=True)
        complied = [a.startswith(r.extra["template"]) for a, r in pairs]
        return judge_answers(prompts, answers).rate, sum(complied) / len(complied)

    heads = ("refused", "complied", "KL: first", "answers", "harmless")
    print(f"{'':24}" + "".join(f"{head:>10}" for head in heads))
    refused, complied = judge(cut_float(model, vauban.plan_cut(model, direction, embedding=True)))
    print(f"{'float model, cut':24}{refused:>10.3f}{complied:>10.3f}")
    for bits in (4, 3):
        narrow = packed(model, bits)
        plan = vauban.plan_cut(narrow, direction, embedding=True)
        calibrated = plan.calibrated(tokenizer, [p for s in sets for p in s[:CALIBRATE]])
        reference = cut_float(narrow, plan)

        def scored(texts: list[Any], reference: nn.Module = reference) -> list[Scored]:
            answers = answer_tokens(reference, tokenizer, texts, max_tokens=40)
            return with_answers(tokenizer, texts, answers)

        asked = scored(prompts)
        first = [Scored(s.ids[: s.start + 1], s.start) for s in asked]
        likelihoods = (first, asked, scored(harmless))
        naive = cut_naive(narrow, plan)
        for name, changed, at_run_time in (
            ("uncut", narrow, ()),
            ("float cut", reference, ()),
            ("naive", naive, ()),
            ("naive, projected", naive, plan.virtual()),
            ("two-sided", plan.apply(copy.deepcopy(narrow), calibrate=False), ()),
            ("calibrated", calibrated.apply(copy.deepcopy(narrow)), ()),
        ):
            rates = ["", ""] if at_run_time else [f"{rate:.3f}" for rate in judge(changed)]
            kls = [compare(reference, changed, s, at_run_time).kl for s in likelihoods]
            columns = [*rates, *(f"{kl:.4f}" for kl in kls)]
            print(f"{bits}-bit {name:18}" + "".join(f"{c:>10}" for c in columns), flush=True)


if __name__ == "__main__":
    main()
