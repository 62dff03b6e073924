"""Theorems of the cut on flat dictionaries and on real mlx-lm models."""

import warnings
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vauban
from tests.conftest import TINY, random_tokens
from vauban._arrays import flat_parameters
from vauban.edits.lowrank import cut_matrix, share_left

FAMILIES = sorted(TINY)


def unit(size: int = 64, seed: int = 3) -> mx.array:
    d = mx.random.normal((size,), key=mx.random.key(seed))
    return d / mx.linalg.norm(d)


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(2, 24),
    width=st.integers(1, 24),
    experts=st.integers(0, 3),
    k=st.integers(1, 2),
    alpha=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1.5]),
    dtype=st.sampled_from([mx.float32, mx.bfloat16, mx.float16]),
    seed=st.integers(0, 2**20),
)
def test_removal_equals_the_dense_form(
    out: int, width: int, experts: int, k: int, alpha: float, dtype: mx.Dtype, seed: int
) -> None:
    """W - α UᵀU W in NumPy float64, for matrices and stacks of experts."""
    shape = (experts, out, width) if experts else (out, width)
    weight = mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)
    rows = mx.random.normal((min(k, out), out), key=mx.random.key(seed + 1))
    basis = vauban.linalg.as_basis(rows, "test")
    got = np.array(cut_matrix(weight, basis, alpha), dtype=np.float64)
    w = np.array(weight.astype(mx.float32), dtype=np.float64)
    u = np.array(basis, dtype=np.float64)
    expected = w - alpha * (u.T @ (u @ w))
    assert np.abs(got - expected).max() <= 1e-5 * max(1.0, np.abs(w).max())


@pytest.mark.parametrize("mode", [None, "column", "frobenius"])
@pytest.mark.parametrize("spiky", [False, True])
def test_norm_modes_that_promise_it_leave_nothing(mode: Any, spiky: bool) -> None:
    d = unit()
    if spiky:
        d = mx.where(mx.arange(64) == 5, 3.0, d)
        d = d / mx.linalg.norm(d)
    weight = mx.random.normal((64, 40), key=mx.random.key(1))
    done = cut_matrix(weight, d[None], 1.0, mode)
    assert share_left(done, weight, d[None]) <= 1e-6
    if mode == "column":
        assert np.allclose(mx.linalg.norm(done, axis=0), mx.linalg.norm(weight, axis=0), rtol=1e-5)
    if mode == "frobenius":
        assert np.isclose(mx.linalg.norm(done).item(), mx.linalg.norm(weight).item(), rtol=1e-5)


def test_row_mode_keeps_rows_and_leaks_as_the_warning_says() -> None:
    d = mx.where(mx.arange(64) == 5, 0.7, 0.7141 * unit())
    d = d / mx.linalg.norm(d)
    weights = {"model.layers.0.mlp.down_proj.weight": mx.random.normal((64, 40))}
    with pytest.warns(vauban.VaubanWarning, match="puts back up to") as caught:
        done = vauban.cut(weights, d, [0], norm_preserve=True)
    name = "model.layers.0.mlp.down_proj.weight"
    norms = mx.linalg.norm(done[name], axis=1), mx.linalg.norm(weights[name], axis=1)
    assert np.allclose(*norms, rtol=1e-4)
    left = share_left(done[name], weights[name], d[None])
    assert left > 0.02
    assert f"{left:.1%}" in str(caught[0].message)


def test_flat_cut_touches_writers_of_target_blocks_only(tiny: Any) -> None:
    for name in ("llama_bias", "qwen3_moe"):
        model = tiny(name)
        weights = flat_parameters(model)
        d = unit()
        done = vauban.cut(weights, d, [1, 3])
        changed = {n for n in weights if not mx.array_equal(weights[n], done[n])}
        writers = [w for w in vauban.residual_writers(model) if w.layer in (1, 3)]
        expected = {f"{w.path}.weight" for w in writers}
        expected |= {f"{w.path}.bias" for w in writers if w.bias}
        assert changed == expected
        for n in expected:
            out = done[n] if n.endswith("bias") else mx.swapaxes(done[n], -1, -2)
            assert mx.abs(out @ d).max().item() <= 1e-5
            assert done[n].dtype == weights[n].dtype


def test_flat_cut_equals_the_plan(tiny: Any) -> None:
    model = tiny("qwen3_moe")
    d = unit()
    done = vauban.cut(flat_parameters(model), d, [0, 1, 2, 3], alpha=0.7)
    vauban.plan_cut(model, d, alpha=0.7, embedding=False).apply(model)
    after = flat_parameters(model)
    assert done.keys() == after.keys()
    for name, value in after.items():
        assert np.allclose(value, done[name], atol=1e-6), name


def test_layer_weights_scale_alpha() -> None:
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]
    weights = {n: mx.ones((4, 3)) for n in names}
    d = mx.array([1.0, 0, 0, 0])
    done = vauban.cut(weights, d, [0, 1], alpha=0.5, layer_weights={1: 2.0})
    assert done[names[0]][0, 0].item() == 0.5 and done[names[1]][0, 0].item() == 0.0


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_packed_writers_come_back_as_floats(bits: int, group: int) -> None:
    """Bits and group size follow from the siblings' rows, also where packings are mixed."""
    config = {"hidden": 64, "heads": 128, "ff": 192}
    prefix = "model.layers.0"
    shapes = {
        "self_attn.q_proj": (config["heads"], 64),
        "self_attn.o_proj": (64, config["heads"]),
        "mlp.up_proj": (config["ff"], 64),
        "mlp.down_proj": (64, config["ff"]),
    }
    weights: dict[str, mx.array] = {}
    plain = {}
    for i, (name, shape) in enumerate(shapes.items()):
        full = mx.random.normal(shape, key=mx.random.key(i))
        own = bits if name.endswith(("o_proj", "down_proj")) else 4
        q, s, b = mx.quantize(full, group_size=group, bits=own)
        plain[name] = mx.dequantize(q, s, b, group_size=group, bits=own)
        weights |= {
            f"{prefix}.{name}.{k}": v for k, v in (("weight", q), ("scales", s), ("biases", b))
        }
    d = unit()
    done = vauban.cut(weights, d, [0])
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert f"{prefix}.{name}.scales" not in done and f"{prefix}.{name}.biases" not in done
        expected = plain[name] - d[:, None] * (d @ plain[name])
        assert np.allclose(done[f"{prefix}.{name}.weight"], expected, atol=1e-5)
    assert mx.array_equal(
        done[f"{prefix}.mlp.up_proj.weight"], weights[f"{prefix}.mlp.up_proj.weight"]
    )


def test_a_packing_that_cannot_be_read_is_refused() -> None:
    """A gated q_proj has twice the rows; taken at its word it would halve the bits."""
    weights = {}
    for name, shape in (("q_proj", (256, 64)), ("o_proj", (64, 128))):
        q, s, b = mx.quantize(mx.random.normal(shape), group_size=64, bits=4)
        path = f"model.layers.0.self_attn.{name}"
        weights |= {f"{path}.weight": q, f"{path}.scales": s, f"{path}.biases": b}
    with pytest.raises(vauban.InputError, match="plan_cut"):
        vauban.cut(weights, unit(), [0])


def test_post_norms_are_refused_on_flat_weights(tiny: Any) -> None:
    for name in ("gemma2", "olmo2", "glm4"):
        with pytest.raises(vauban.InputError, match="plan_cut"):
            vauban.cut(flat_parameters(tiny(name)), unit(), [0])


@pytest.mark.parametrize(
    ("direction", "layers", "message"),
    [
        (mx.zeros(64), [0], "is zero"),
        (mx.full((64,), float("nan")), [0], "NaN"),
        (mx.ones(63), [0], "63 components"),
        (mx.ones(64), [9], "block 9 does not exist"),
        (mx.ones(64), [], "target_layers is empty"),
    ],
)
def test_degenerate_input(tiny: Any, direction: mx.array, layers: list[int], message: str) -> None:
    with pytest.raises(vauban.InputError, match=message):
        vauban.cut(flat_parameters(tiny("llama")), direction, layers)


def test_a_block_without_a_writer_is_an_error(tiny: Any) -> None:
    weights = {n: v for n, v in flat_parameters(tiny("llama")).items() if "layers.2" not in n}
    weights["model.layers.2.mlp.up_proj.weight"] = mx.ones((96, 64))
    with pytest.raises(vauban.InputError, match="block 2 has no residual writer"):
        vauban.cut(weights, unit(), [1, 2])


def test_biprojection_is_orthogonal_and_refuses_a_swapped_measure() -> None:
    weights = {"model.layers.0.mlp.down_proj.weight": mx.random.normal((64, 40))}
    refusal, mean = unit(seed=1), 5.0 * unit(seed=2) + unit(seed=1)
    done = vauban.cut_biprojected(weights, refusal, mean, [0])
    name = "model.layers.0.mlp.down_proj.weight"
    change = done[name] - weights[name]
    # What is cut has no part along the harmless mean, so the output along it is untouched.
    assert mx.abs((mean / mx.linalg.norm(mean)) @ change).max().item() <= 1e-5
    with pytest.raises(vauban.InputError, match="harmless_mean"):
        vauban.cut_biprojected(weights, refusal, -refusal, [0])


def test_a_subspace_is_cut_jointly_whatever_its_order() -> None:
    weights = {"model.layers.0.mlp.down_proj.weight": mx.random.normal((64, 40))}
    name = "model.layers.0.mlp.down_proj.weight"
    rows = mx.stack([unit(seed=1), unit(seed=2) + 2 * unit(seed=1), unit(seed=4)])
    a = vauban.cut_subspace(weights, rows, [0])[name]
    b = vauban.cut_subspace(weights, rows[mx.array([2, 0, 1])], [0])[name]
    assert mx.abs(rows @ a).max().item() <= 1e-5
    assert np.allclose(a, b, atol=1e-5)
    with pytest.raises(vauban.InputError, match="linearly dependent"):
        vauban.cut_subspace(weights, mx.stack([unit(), 2 * unit()]), [0])


def test_sparsify() -> None:
    d = unit()
    for share, kept in ((0.0, 64), (0.5, 32), (0.9, 6), (0.999, 1)):
        sparse = vauban.sparsify_direction(d, share)
        assert int((sparse != 0).sum()) == kept
        assert np.isclose(mx.linalg.norm(sparse).item(), 1.0, atol=1e-6)
        top = set(np.argsort(-np.abs(np.array(d)))[:kept].tolist())
        assert set(np.flatnonzero(np.array(sparse)).tolist()) == top
    with pytest.raises(vauban.InputError):
        vauban.sparsify_direction(d, 1.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_planned_cut_empties_the_stream(tiny: Any, name: str) -> None:
    """Every writer, every expert, biases, post-norm gains and the embedding: nothing is left."""
    model = tiny(name)
    d = unit()
    plan = vauban.plan_cut(model, d, embedding=True)
    leak = plan.leakage()
    assert leak.worst <= 1e-6 and leak.stream <= 1e-6
    tokens = random_tokens(2, 21)
    virtual = vauban.forward(model, tokens, positions="all", interventions=plan.virtual())
    plan.apply(model)
    real = vauban.forward(model, tokens, positions="all")
    share = mx.abs(real.residual @ d) / mx.linalg.norm(real.residual, axis=-1)
    assert share.max().item() <= 1e-5
    # Run-time cut = weight cut, logits included (an untied head keeps its matrix in both).
    assert mx.abs(virtual.residual - real.residual).max().item() <= 1e-4
    assert mx.abs(virtual.logits - real.logits).max().item() <= 1e-4


def test_the_plain_cut_would_leak_behind_a_post_norm(tiny: Any) -> None:
    """The gain matters: without it the same cut leaves a good part of the direction."""
    from dataclasses import replace

    model = tiny("olmo2")
    plan = vauban.plan_cut(model, unit(), embedding=True)
    plain = replace(plan, updates=tuple(replace(u, basis=plan.basis) for u in plan.updates))
    assert plain.stream_leak(model) > 0.05 and plan.stream_leak(model) <= 1e-6


def test_alpha_and_strengthening_in_the_stream(tiny: Any) -> None:
    """Without norms behind the writers the component of each writer scales by 1 - α."""
    model = tiny("llama")
    d = unit()
    x = mx.random.normal((3, 96), key=mx.random.key(8))
    before = model.model.layers[2].mlp.down_proj(x) @ d
    vauban.plan_cut(model, d, alpha=-1.0).apply(model)
    after = model.model.layers[2].mlp.down_proj(x) @ d
    assert np.allclose(after, 2 * before, atol=1e-4)


def test_tied_models_are_untied_and_the_head_keeps_its_matrix(tiny: Any) -> None:
    model = tiny("qwen3")
    head = mx.array(model.model.embed_tokens.weight)
    plan = vauban.plan_cut(model, unit(), embedding=True)
    assert plan.embedding == "untie"
    plan.apply(model)
    assert mx.array_equal(model.lm_head.weight, head)
    assert mx.abs(model.model.embed_tokens.weight @ unit()).max().item() <= 1e-5


@pytest.mark.parametrize("precision", ["float", "8bit", "same"])
@pytest.mark.parametrize("group", [32, 64])
def test_packed_models_are_planned_and_applied(tiny: Any, precision: str, group: int) -> None:
    """Packed writers stay packed, exact along the direction; or 8 bits, or float, as asked."""
    for name in ("qwen3", "qwen3_moe") if group == 32 else ("qwen3",):
        model = tiny(name, intermediate_size=128) if group == 64 else tiny(name)
        nn.quantize(model, group_size=group, bits=4)
        tokens = random_tokens(1, 12)
        plan = vauban.plan_cut(model, unit(), embedding=True)
        before = {w.path: w.quantization for w in vauban.residual_writers(model)}
        assert all(before.values())
        virtual = vauban.forward(model, tokens, interventions=plan.virtual()).logits
        scale = float(mx.abs(virtual).max())
        plan.apply(model, precision)
        after = {w.path: w.quantization for w in vauban.residual_writers(model)}
        out = vauban.forward(model, tokens, positions="all")
        share = mx.abs(out.residual @ unit()) / mx.linalg.norm(out.residual, axis=-1)
        assert share.max().item() <= 1e-4
        if precision == "same":
            assert after == before
        elif precision == "8bit":
            assert {q["bits"] for q in after.values()} == {8}
        else:
            assert not any(after.values())
            assert mx.abs(out.logits - virtual).max().item() <= 2e-3 * scale


def test_plan_refuses_what_it_cannot_do(tiny: Any) -> None:
    model = tiny("llama_bias")
    for arguments, message in (
        ({"direction_or_basis": mx.ones(5)}, "5 components"),
        ({"direction_or_basis": unit(), "layers": [7]}, "block 7"),
        ({"direction_or_basis": unit(), "components": ["head"]}, "components"),
        ({"direction_or_basis": unit(), "norm_preserve": "rows"}, "norm_preserve"),
        ({"direction_or_basis": unit(), "embedding": "maybe"}, "embedding"),
    ):
        with pytest.raises(vauban.InputError, match=message):
            vauban.plan_cut(model, **arguments)
    with pytest.raises(vauban.InputError, match="no switch"):
        vauban.plan_cut(tiny("gemma"), unit(), embedding="untie")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vauban.plan_cut(model, unit(), norm_preserve="column")


def strength_of_the_embedding(model: Any, **options: Any) -> float | None:
    """α of the embedding's update; None where it is kept."""
    plan = vauban.plan_cut(model, unit(), **options)
    return next((u.alpha for u in plan.updates if u.is_embedding), None)


def test_strengths_and_components_reach_the_embedding(tiny: Any) -> None:
    """ "auto" cuts it as every other writer is cut, and leaves it where they differ."""
    model = tiny("llama")
    n = len(model.layers)
    assert strength_of_the_embedding(model, alpha=0.7) == 0.7
    halves = dict.fromkeys(range(n), 0.5)
    assert strength_of_the_embedding(model, layer_weights=halves) == 0.5
    assert strength_of_the_embedding(model, layer_weights=dict.fromkeys(range(n), 0.0)) is None
    assert strength_of_the_embedding(model, layer_weights={0: 0.5}) is None
    assert strength_of_the_embedding(model, components=["attention"]) is None
    assert strength_of_the_embedding(model, components={"attention": 1.0, "mlp": 0.5}) is None
    assert strength_of_the_embedding(model, components={"attention": 2.0, "mlp": 2.0}) == 2.0
    # Named, it has the strength that it is given.
    given = {"attention": 1.0, "mlp": 0.5, "embedding": 0.25}
    assert strength_of_the_embedding(model, components=given) == 0.25
    assert strength_of_the_embedding(model, layer_weights={-1: 0.3, 0: 0.5}) == pytest.approx(0.3)
    assert strength_of_the_embedding(model, components=["attention"], embedding=True) == 1.0
    with pytest.raises(vauban.InputError, match="name the embedding, which is kept"):
        vauban.plan_cut(model, unit(), layer_weights={-1: 0.3}, embedding=False)


def test_a_strength_of_a_block_counts_behind_a_post_norm(tiny: Any) -> None:
    """Only α 1 is exact there, whichever of the three factors makes it another."""
    model = tiny("gemma2")
    assert not any("post-norm" in n for n in vauban.plan_cut(model, unit(), embedding=True).notes)
    for options in ({"alpha": 0.5}, {"layer_weights": {0: 0.5}}, {"components": {"mlp": 0.5}}):
        assert any("post-norm" in n for n in vauban.plan_cut(model, unit(), **options).notes)


def test_nan_is_no_perfect_cut(tiny: Any) -> None:
    """NaN compares as smaller than anything: it must not read as nothing left."""
    from vauban.edits import Leakage
    from vauban.edits.lowrank import share_left

    assert np.isnan(Leakage({"a": 1e-8, "b": float("nan"), "c": 1e-7}, 0.0).worst)
    broken = mx.full((64, 8), float("nan"))
    assert np.isnan(share_left(mx.ones((64, 8)), broken, unit()[None]))
    assert np.isnan(share_left(broken, mx.ones((64, 8)), unit()[None]))
    assert share_left(mx.ones((64, 8)), mx.zeros((64, 8)), mx.eye(64)[:1]) == float("inf")
    model = tiny("llama")
    plan = vauban.plan_cut(model, unit(), embedding=True)
    assert plan.stream_leak(model) < 1e-6
    weight = model.model.layers[1].mlp.down_proj.weight
    weight[3, 5] = float("nan")
    with pytest.raises(vauban.ModelError, match="holds NaN"):
        plan.leakage()
    with pytest.raises(vauban.ModelError, match="stream"):
        plan.stream_leak(model)


def test_nan_in_a_report_is_not_as_planned() -> None:
    shares = {"a": 1e-6, "b": float("nan"), "c": 1e-5}
    report = vauban.ExportReport(
        "out", 0.0, 3, 3, True, shares, shares, 0.0, "same", {}, {}, 0
    )  # fmt: skip
    assert not report.ok
    with pytest.raises(vauban.CheckError, match="b is off by nan"):
        report.check()
