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
from vauban.evaluation.likelihood import Scored, compare
from vauban.models import decode
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


@pytest.mark.parametrize(
    ("bits", "embedding", "share"), [(4, False, 1 / 3), (4, "auto", 0.5), (3, "auto", 1 / 3)]
)
def test_the_decision_is_the_float_cuts(bits: int, embedding: Any, share: float) -> None:
    """KL to the float cut where the answer begins, and refusals, against naive requantization's.

    Refusals are within two points of the float cut's. At 3 bits naive requantization leaves a fifth
    of the refusals, and the KL is at most a third of its; at 4 bits that holds for the twelve
    writers. With the embedding's 4-bit rows a few undecided prompts make half of either KL, and
    which way they fall is chance: docs/editing.md has the average over several calibrations.
    """
    folder = vauban.organism_path("dense")
    model, tokenizer = vauban.load(folder)
    sets = [vauban.load_prompts(folder / f"prompts/{n}.jsonl") for n in ("harmful", "harmless")]
    rows = vauban.load_labelled_prompts(folder / "prompts/eval.jsonl")
    prompts = [r.prompt for r in rows if r.label == "harmful"]
    direction = vauban.measure(model, tokenizer, *sets)
    nn.quantize(model, group_size=64, bits=bits)
    plan = vauban.plan_cut(unpacked(model), direction, embedding=embedding)
    reference = plan.apply(copy.deepcopy(model), "float")
    calibrated = plan.calibrated(tokenizer, sets[0][:32] + sets[1][:32])
    exact = calibrated.apply(copy.deepcopy(model))
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
    assert compare(reference, exact, first).kl <= share * compare(reference, naive, first).kl

    def refused(changed: nn.Module) -> float:
        ids = answer_tokens(changed, tokenizer, prompts, max_tokens=12)
        return judge_answers(prompts, [decode(tokenizer, i) for i in ids]).rate

    left = refused(exact)
    assert abs(left - refused(reference)) <= 0.02
    if bits == 3:
        assert left + 0.1 < refused(naive)
