"""What a caller may give to `cut` and `plan_cut`, and what is refused instead of being dropped."""

import json
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import vauban
from tests.architectures import build as architectures
from tests.conftest import build
from vauban._arrays import flat_parameters
from vauban.directions import Direction, fit_inlp, fit_leace
from vauban.edits.directions import biproject

DOWN = "model.layers.0.mlp.down_proj.weight"


def unit(seed: int = 3) -> mx.array:
    d = mx.random.normal((64,), key=mx.random.key(seed))
    return d / mx.linalg.norm(d)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Read only."""
    return build("llama")


@pytest.fixture(scope="module")
def weights(model: nn.Module) -> dict[str, mx.array]:
    return flat_parameters(model)


def planned_alphas(model: nn.Module, **options: Any) -> dict[int, float]:
    plan = vauban.plan_cut(model, unit(), embedding=False, **options)
    return {u.layer: u.alpha for u in plan.updates}


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": np.float32(0.5)},
        {"alpha": mx.array(0.5)},
        {"layer_weights": {i: np.float32(0.5) for i in range(4)}},
        {"layer_weights": {np.int64(i): mx.array(0.5) for i in range(4)}},
        {"components": {"attention": np.float64(0.5), "mlp": mx.array(0.5)}},
    ],
)
def test_numbers_of_numpy_and_mlx_become_pythons(model: nn.Module, options: Any) -> None:
    plan = vauban.plan_cut(model, unit(), embedding=False, **options)
    assert [u.alpha for u in plan.updates] == [0.5] * 8
    assert {type(u.alpha) for u in plan.updates} == {float}
    assert "0.5" in json.dumps(plan.to_dict())


def test_the_settings_of_a_sparse_plan_are_json(model: nn.Module) -> None:
    plan = vauban.plan_cut(model, unit(), sparse=np.float32(0.25), layers=np.array([0, 2]))
    assert json.loads(json.dumps(plan.settings))["sparse"] == 0.25
    assert plan.settings["layers"] == [0, 2]


@pytest.mark.parametrize("layers", [2, np.int64(2), mx.array(2), mx.array([2]), (2,), {2}])
def test_blocks_are_named_in_one_way_in_both(
    model: nn.Module, weights: dict[str, mx.array], layers: Any
) -> None:
    assert set(planned_alphas(model, layers=layers)) == {2}
    done = vauban.cut(weights, unit(), layers)
    changed = {n for n in weights if not mx.array_equal(weights[n], done[n])}
    assert {n.split(".")[2] for n in changed} == {"2"} and len(changed) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": None}, "layers is None; expected 'all', an int or a list"),
        ({"layers": True}, "is True; expected an int"),
        ({"layers": [1.7]}, "is 1.7; expected an int"),
        ({"layers": ["0"]}, "is '0'; expected an int"),
        ({"alpha": "1"}, "alpha is '1'; expected a number"),
        ({"alpha": None}, "alpha is None; expected a number"),
        ({"alpha": [1, 2]}, "expected a number"),
        ({"alpha": float("nan")}, "alpha is nan; expected a finite"),
        ({"alpha": 1e39}, "expected a finite"),
        ({"layer_weights": [1.0] * 4}, "expected {block: factor}"),
        ({"layer_weights": {99: 0.0, -1: 1.0}}, r"names \[99\], which are not cut"),
        ({"layer_weights": {1: 0.0}, "layers": [0]}, r"names \[1\], which are not cut"),
        ({"layer_weights": {"0": 0.0}}, "is '0'; expected an int"),
        ({"layer_weights": {0: float("inf")}}, r"layer_weights\[0\] is inf"),
        ({"components": None}, "components is None"),
        ({"components": {"mlp": "1"}}, r"components\['mlp'\] is '1'"),
        ({"biases": "no"}, "biases is 'no'"),
        ({"preserve": mx.zeros((3, 64))}, "collect_preservation_keys"),
        ({"set_to": "foo"}, "expected a number, {residual: number} or 'harmless'"),
        ({"set_to": {4: "x"}}, r"set_to\[4\] is 'x'"),
        ({"sparse": "0.1"}, "sparse is '0.1'"),
        ({"sparse": 0.2, "norm_preserve": "column"}, "give one of them"),
    ],
)
def test_plan_cut_refuses(model: nn.Module, options: Any, message: str) -> None:
    with pytest.raises(vauban.InputError, match=message):
        vauban.plan_cut(model, unit(), **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_layers": "1"}, "expected 'all'"),
        ({"target_layers": None}, "expected 'all'"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"layer_weights": {5: 0.0}}, r"names \[5\], which are not cut"),
        ({"layer_weights": {"0": 0.0}}, "is '0'; expected an int"),
        ({"direction": "refusal"}, "expected an array"),
        ({"direction": None}, "expected an array"),
        ({"direction": mx.zeros((0, 64))}, "empty basis"),
    ],
)
def test_cut_refuses(weights: dict[str, mx.array], arguments: Any, message: str) -> None:
    given = {"direction": unit(), "target_layers": [0], **arguments}
    with pytest.raises(vauban.InputError, match=message):
        vauban.cut(weights, given.pop("direction"), given.pop("target_layers"), **given)


def test_cut_asks_for_a_flat_dictionary_of_mlx_arrays(model: nn.Module) -> None:
    pairs: Any = tree_flatten(model.parameters())
    for wrong in (pairs, model.parameters(), {k: np.array(v) for k, v in pairs}):
        with pytest.raises(vauban.InputError, match=r"dict\(tree_flatten"):
            vauban.cut(wrong, unit(), [0])


def test_fitted_results_are_cut_and_an_eraser_is_not(
    model: nn.Module, weights: dict[str, mx.array]
) -> None:
    rng = np.random.default_rng(0)
    y = mx.array(rng.integers(0, 2, 200))
    X = mx.array(rng.normal(size=(200, 64)).astype(np.float32)) + 3 * y[:, None] * unit()
    found = fit_inlp(X, y)
    assert found.rank >= 1
    for result, rows in (
        (found, found.directions),
        (Direction(7 * unit(), 0.0, "test"), unit()[None]),
    ):
        plan = vauban.plan_cut(model, result)
        assert np.allclose(plan.basis, rows, atol=1e-5)
        done = vauban.cut(weights, result, [0])
        assert mx.abs(rows @ done[DOWN]).max().item() <= 1e-5 < mx.abs(rows @ weights[DOWN]).max()
    for call in (lambda r: vauban.plan_cut(model, r), lambda r: vauban.cut(weights, r, [0])):
        with pytest.raises(vauban.InputError, match="LeaceResult is an oblique map"):
            call(fit_leace(X, y))
        with pytest.raises(vauban.InputError, match="empty basis"):
            call(mx.zeros((0, 64)))


def test_biprojection_takes_every_row(weights: dict[str, mx.array]) -> None:
    refusal = mx.stack([unit(1), unit(2), unit(5)])
    harmless = unit(4) + unit(1)
    rows = biproject(refusal, harmless)
    assert rows.shape == (3, 64)
    assert np.allclose(rows @ rows.T, np.eye(3), atol=1e-6)
    assert mx.abs(rows @ harmless).max().item() <= 1e-6
    # Each of them is the refusal direction up to the harmless one.
    b = harmless / mx.linalg.norm(harmless)
    rest = refusal - (refusal @ b)[:, None] * b
    assert mx.abs(rest - (rest @ rows.T) @ rows).max().item() <= 1e-6
    done = vauban.cut_biprojected(weights, refusal, harmless, [0])
    assert mx.abs(rows @ done[DOWN]).max().item() <= 1e-5
    assert mx.abs(harmless @ (done[DOWN] - weights[DOWN])).max().item() <= 1e-5
    with pytest.raises(vauban.InputError, match="harmless_mean"):
        vauban.cut_biprojected(weights, refusal, unit(1) + 3 * unit(2), [0])
    with pytest.raises(vauban.InputError, match="2 directions are given; expected one"):
        vauban.sparsify_direction(refusal[:2], 0.5)


def test_biases_that_stay_are_named_and_the_rest_is_cut() -> None:
    model = build("llama_bias")
    plan = vauban.plan_cut(model, unit(), layers=[1], biases=False)
    assert "2 biases are left and write the direction (model.layers.1." in plan.summary()
    assert plan.settings["biases"] is False
    before = flat_parameters(model)
    plan.apply(model)
    after = flat_parameters(model)
    changed = {n for n in before if not mx.array_equal(before[n], after[n])}
    assert changed == {f"{u.path}.weight" for u in plan.updates}
    assert not any(u.bias for u in vauban.plan_cut(model, unit(), biases=np.bool_(False)).updates)
    # None is the default, True; without a bias among the chosen writers there is nothing to say.
    assert all(u.bias for u in vauban.plan_cut(model, unit(), layers=[1], biases=None).updates)
    assert vauban.plan_cut(build("llama"), unit(), biases=False).notes == ()
    with pytest.raises(vauban.InputError, match="biases=False"):
        vauban.plan_cut(model, unit(), biases=False, set_to=0.5)


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss"])
def test_biases_that_stay_do_so_at_run_time_too(name: str) -> None:
    """An output that is changed as a whole would lose the bias's share of the direction."""
    model = architectures.build(name)
    size = vauban.residual_writers(model)[0].shape[-1]
    d = mx.random.normal((size,), key=mx.random.key(5))
    plan = vauban.plan_cut(model, d, biases=False, embedding=False)
    tokens = mx.array([[3, 5, 7, 11, 13]])
    before = vauban.forward(model, tokens).logits
    virtual = vauban.forward(model, tokens, interventions=plan.virtual()).logits
    applied = vauban.forward(plan.apply(model), tokens).logits
    assert float(mx.abs(applied - virtual).max()) < 1e-4 * float(mx.abs(before - virtual).max())


def test_a_float_sibling_does_not_say_how_a_writer_is_packed() -> None:
    """Values narrower than keys: o_proj reads fewer components than q_proj has rows."""
    base = "model.layers.0.self_attn"
    packed = mx.quantize(mx.random.normal((64, 128)), group_size=32, bits=4)
    names = ("weight", "scales", "biases")
    weights = {f"{base}.o_proj.{n}": v for n, v in zip(names, packed, strict=True)}
    weights[f"{base}.q_proj.weight"] = mx.random.normal((256, 64))
    with pytest.raises(vauban.InputError, match="plan_cut"):
        vauban.cut(weights, unit(), [0])
