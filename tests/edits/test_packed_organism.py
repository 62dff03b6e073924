"""What packing does to a cut organism's behaviour: its decision, against naive requantization's."""

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_unflatten

import vauban
from vauban.edits.modules import float_module, module_weight, repacked_module
from vauban.evaluation.behaviour import answer_tokens, judge_answers
from vauban.evaluation.likelihood import compare_sequences as compare
from vauban.evaluation.sequences import Scored
from vauban.generation import decode
from vauban.prompts import encode_chat


def unpacked(model: nn.Module) -> nn.Module:
    """The same numbers as floats: on a CPU packed matrices multiply some ten times slower."""
    twin = copy.deepcopy(model)
    for path, module in twin.named_modules():
        if "scales" in module:
            plain = float_module(module)
            plain.weight = module_weight(module).astype(mx.float32)
            twin.update_modules(tree_unflatten([(path, plain)]))
    return twin


def refused(model: nn.Module, tokenizer: Any, prompts: list[str]) -> float:
    ids = answer_tokens(model, tokenizer, prompts, max_tokens=12)
    return judge_answers(prompts, [decode(tokenizer, i) for i in ids]).rate


@pytest.fixture(scope="module")
def float_refused() -> float:
    """What the float organism refuses after its cut."""
    folder = vauban.organism_path("dense")
    model, tokenizer = vauban.load(folder)
    sets = [vauban.load_prompts(folder / f"prompts/{n}.jsonl") for n in ("harmful", "harmless")]
    vauban.plan_cut(model, vauban.measure(model, tokenizer, *sets)).apply(model)
    rows = vauban.load_labelled_prompts(folder / "prompts/eval.jsonl")
    return refused(model, tokenizer, [r.prompt for r in rows if r.label == "harmful"])


@pytest.mark.parametrize("bits", [4, 3])
def test_the_decision_is_the_float_cuts(bits: int, float_refused: float) -> None:
    """KL to the float cut where the answer begins, and refusals, against naive requantization's.

    As it comes: rounded for what is read on the folder's own prompts, of which none are these. The
    KL is at most a third of naive requantization's and refusals are within two points of the float
    organism's after its cut; at 3 bits naive requantization leaves a fifth of them. The embedding
    is shared and stays; docs/editing.md has the averages with it over several calibrations.
    """
    folder = vauban.organism_path("4bit" if bits == 4 else "dense")
    model, tokenizer = vauban.load(folder)
    sets = [vauban.load_prompts(folder / f"prompts/{n}.jsonl") for n in ("harmful", "harmless")]
    rows = vauban.load_labelled_prompts(folder / "prompts/eval.jsonl")
    prompts = [r.prompt for r in rows if r.label == "harmful"]
    if bits != 4:
        nn.quantize(model, group_size=64, bits=bits)
    direction = vauban.measure(unpacked(model), tokenizer, *sets)
    plan = vauban.plan_cut(model, direction)
    reference = plan.apply(copy.deepcopy(model), "float")
    exact = plan.apply(copy.deepcopy(model))
    naive = copy.deepcopy(reference)
    old, cut = dict(model.named_modules()), dict(reference.named_modules())
    for update in plan.updates:
        q, s, b = mx.quantize(module_weight(cut[update.path]), group_size=64, bits=bits)
        arrays = {"weight": q, "scales": s, "biases": b}
        again = repacked_module(old[update.path], arrays, bits, 64, "affine")
        naive.update_modules(tree_unflatten([(update.path, again)]))
    reference, exact, naive = map(unpacked, (reference, exact, naive))
    starts = [encode_chat(tokenizer, prompt) for prompt in prompts]
    # The scored token is the one that the prompt's last position predicts.
    first = [Scored([*ids, 0], len(ids)) for ids in starts]
    assert compare(reference, exact, first).kl <= compare(reference, naive, first).kl / 3

    left = refused(exact, tokenizer, prompts)
    assert abs(left - float_refused) <= 0.02
    if bits == 3:
        assert left + 0.1 < refused(naive, tokenizer, prompts)
