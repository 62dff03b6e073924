"""Cuts that leave part of the direction on purpose: packed, that part is there as planned."""

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

import vauban
from vauban.edits import Preserve, collect_preservation_keys
from vauban.edits.modules import module_weight


@pytest.fixture(scope="module")
def organism() -> tuple[Any, Any]:
    return vauban.load(vauban.organism_path("4bit"))


def stored(
    plan: vauban.EditPlan, model: nn.Module, calibrate: bool = False
) -> dict[str, nn.Module]:
    edited = dict(plan.apply(copy.deepcopy(model), calibrate=calibrate).named_modules())
    return {u.path: edited[u.path] for u in plan.updates}


def missed(
    plan: vauban.EditPlan, model: nn.Module, after: dict[str, nn.Module]
) -> dict[str, float]:
    """‖U (Ŵ - T)‖/‖U W‖ per writer, in float32."""
    before, found = dict(model.named_modules()), {}
    for update in plan.updates:
        old = module_weight(before[update.path])
        wrong = update.removed(module_weight(after[update.path])) - update.removed(
            update.weight(old)
        )
        found[update.path] = float(mx.linalg.norm(wrong) / mx.linalg.norm(update.removed(old)))
    return found


@pytest.mark.parametrize(
    ("alpha", "calibrate"), [(0.5, False), (0.5, True), (-1.0, False), (2.0, False)]
)
def test_a_partial_cut_leaves_what_was_planned(
    organism: Any, alpha: float, calibrate: bool
) -> None:
    model, _ = organism
    plan = vauban.plan_cut(model, mx.random.normal((128,), key=mx.random.key(1)), alpha=alpha)
    before, after = dict(model.named_modules()), stored(plan, model, calibrate)
    assert max(missed(plan, model, after).values()) <= 1e-3
    for update in plan.updates:
        module = after[update.path]
        assert module.bits == 4
        left = update.share_left(module_weight(module), module_weight(before[update.path]))
        assert left == pytest.approx(abs(1 - alpha), abs=2e-3)


def test_layer_weights_survive_packing(organism: Any) -> None:
    model, _ = organism
    d = mx.random.normal((128,), key=mx.random.key(1))
    plan = vauban.plan_cut(model, d, layer_weights={0: 0.0, 1: 0.25}, embedding=False)
    before, after = dict(model.named_modules()), stored(plan, model)
    for update in plan.updates:
        left = update.share_left(
            module_weight(after[update.path]), module_weight(before[update.path])
        )
        assert left == pytest.approx(1 - update.alpha, abs=2e-3)


def test_protected_and_row_normalised_cuts_survive_packing(organism: Any) -> None:
    model, tokenizer = organism
    d = mx.random.normal((128,), key=mx.random.key(1))
    keys = collect_preservation_keys(model, tokenizer, ["Name a colour.", "What is 2 + 3?"])
    protected = vauban.plan_cut(model, d, preserve=Preserve(keys, rank=20))
    rows = vauban.plan_cut(model, d, norm_preserve="row", embedding=False)
    for plan in (protected, rows):
        assert max(missed(plan, model, stored(plan, model)).values()) <= 1e-3


def test_a_sparse_cut_moves_codes_of_its_own_rows_only(organism: Any) -> None:
    model, _ = organism
    d = mx.random.normal((128,), key=mx.random.key(1))
    plan = vauban.plan_cut(model, d, sparse=0.5, embedding=False)
    before, after = dict(model.named_modules()), stored(plan, model)
    for update in plan.updates:
        assert update.rows is not None
        kept = mx.flatten(update.rows) == 0
        old, new = module_weight(before[update.path]), module_weight(after[update.path])
        unmoved = mx.abs(new - old).max(axis=1) == 0
        assert bool(mx.all(unmoved == kept))
        moved = mx.linalg.norm(update.removed(new)) / mx.linalg.norm(update.removed(old))
        planned = mx.linalg.norm(update.removed(update.weight(old)))
        planned = planned / mx.linalg.norm(update.removed(old))
        assert float(moved) == pytest.approx(float(planned), abs=2e-3)
