"""Sparse direction surgery against its definitions, computed row by row in plain Python."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import vauban
from vauban.edits.sparse import SparseDirectionSurgeon, gini, knee


def random_case(rows: int = 37, width: int = 16, seed: int = 0) -> tuple[mx.array, mx.array]:
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(rows, width)) * rng.exponential(size=(rows, 1))
    return mx.array(weight.astype(np.float32)), mx.array(rng.normal(size=width).astype(np.float32))


def by_hand(weight: mx.array, r: mx.array, sparsity: float) -> dict[str, Any]:
    """The definitions, one row after the other, in float64."""
    w, d = np.array(weight, dtype=np.float64), np.array(r, dtype=np.float64)
    d = d / np.sqrt((d * d).sum())
    size = sorted((abs(sum(a * b for a, b in zip(row, d, strict=True))) for row in w), reverse=True)
    n = max(1, int(sparsity * len(size)))
    ascending = size[::-1]
    total = sum(size)
    spread = 2 * sum((i + 1) * x for i, x in enumerate(ascending)) / (len(size) * total)
    index = spread - (len(size) + 1) / len(size)
    return {
        "n_rows_modified": n,
        "mean_projection": total / len(size),
        "max_projection": size[0],
        "median_projection": ascending[(len(size) - 1) // 2],
        "refusal_sparsity_index": index,
        "energy_removed": sum(x * x for x in size[:n]) / sum(x * x for x in size),
        "frobenius_change": math.sqrt(sum(x * x for x in size[:n])) / math.sqrt((w * w).sum()),
    }


@pytest.mark.parametrize("rows", [1, 2, 36, 37])
@pytest.mark.parametrize("sparsity", [0.01, 0.1, 0.5, 1.0])
def test_analysis(rows: int, sparsity: float) -> None:
    weight, r = random_case(rows)
    found = SparseDirectionSurgeon(sparsity).analyze_weight_matrix(weight, r, 3).to_dict()
    assert found["layer_idx"] == 3 and found["n_rows_total"] == rows
    for name, value in by_hand(weight, r, sparsity).items():
        assert math.isclose(found[name], value, rel_tol=1e-5, abs_tol=1e-7), name
    assert found["projection_gini"] == found["refusal_sparsity_index"]


# Made outside this repository from the definitions of seed 002 in NumPy float64.
SEED = json.loads((Path(__file__).parent / "fixtures/sparse_surgery.json").read_text("utf-8"))


def seeded(case: dict[str, Any]) -> tuple[mx.array, mx.array]:
    """The matrix, its rows' sizes, the direction: drawn in this order, stored in float32."""
    rng = np.random.default_rng(case["seed"])
    weight = rng.normal(size=(case["rows"], case["width"]))
    scale = np.exp(case["spread"] * rng.normal(size=(case["rows"], 1)))
    r = rng.normal(size=case["width"])
    return mx.array((weight * scale).astype(np.float32)), mx.array(r.astype(np.float32))


@pytest.mark.parametrize("case", SEED["cases"], ids=lambda c: f"seed {c['seed']}")
def test_the_numbers_of_the_seed(case: dict[str, Any]) -> None:
    weight, r = seeded(case)
    surgeon = SparseDirectionSurgeon(case["sparsity"], case["auto_sparsity"])
    found = surgeon.analyze_weight_matrix(weight, r, side="input").to_dict()
    for name, value in case["expected"].items():
        assert math.isclose(found[name], value, rel_tol=1e-5, abs_tol=1e-7), name
    with pytest.warns(vauban.VaubanWarning, match="side='output'"):
        done = np.array(surgeon.apply_sparse_projection(weight, r, side="input"), dtype=np.float64)
    changed = np.flatnonzero((done != np.array(weight)).any(1))
    assert changed.tolist() == case["top_rows"]
    size = np.abs(done).sum(1).max()
    assert np.allclose(done.sum(1), case["row_sums"], rtol=0, atol=1e-5 * size)
    assert np.allclose((done**2).sum(1), case["row_squares"], rtol=1e-5, atol=1e-5)


def test_the_plan_of_the_seed() -> None:
    expected = SEED["plan"]
    cases = {c["seed"]: seeded(c) for c in SEED["cases"] if c["seed"] in expected["layers"]}
    plan = SparseDirectionSurgeon(expected["sparsity"]).plan_surgery(
        {i: w for i, (w, _) in cases.items()}, {i: r for i, (_, r) in cases.items()}, side="input"
    )
    found = plan.to_dict()
    for name, value in expected.items():
        if name not in ("layers", "sparsity"):
            assert math.isclose(found[name], value, rel_tol=1e-5, abs_tol=1e-7), name


def test_gini_edges() -> None:
    assert gini(np.ones(10)) == pytest.approx(0.0, abs=1e-12)
    assert gini(np.eye(100)[0]) == pytest.approx(0.99)
    assert gini(np.zeros(5)) == 0.0 and gini(np.zeros(0)) == 0.0


def test_knee() -> None:
    curve = np.r_[np.full(5, 10.0), np.linspace(0.5, 0.1, 45)]
    assert 0.1 <= knee(curve, 0.9) <= 0.14
    assert knee(np.linspace(1, 0, 50), 0.9) == pytest.approx(0.02, abs=0.5)
    assert knee(np.zeros(9), 0.3) == 0.3 and knee(np.ones(2), 0.3) == 0.3
    assert knee(np.r_[np.ones(99), 0.0], 0.3) == 0.5


def test_only_the_top_rows_change_and_lose_the_direction() -> None:
    weight, r = random_case()
    unit = r / mx.linalg.norm(r)
    with pytest.warns(vauban.VaubanWarning, match="side='output'"):
        done = SparseDirectionSurgeon(0.2).apply_sparse_projection(weight, r)
    before, after = np.abs(np.array(weight @ unit)), np.abs(np.array(done @ unit))
    top = np.argsort(-before)[:7]
    assert after[top].max() <= 1e-5 * before.max()
    rest = np.setdiff1d(np.arange(37), top)
    assert (np.array(done)[rest] == np.array(weight)[rest]).all()


def test_output_side_is_the_cut_restricted_to_rows() -> None:
    weight = mx.random.normal((24, 10), key=mx.random.key(0))
    d = mx.random.normal((24,), key=mx.random.key(1))
    surgeon = SparseDirectionSurgeon()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        everything = surgeon.apply_sparse_projection(weight, d, 1.0, side="output")
        some = surgeon.apply_sparse_projection(weight, d, 0.5, side="output")
    unit = d / mx.linalg.norm(d)
    assert mx.abs(unit @ everything).max().item() <= 1e-5
    top = np.argsort(-np.abs(np.array(d)))[:12]
    expected = np.array(weight)
    expected[top] = np.array(everything)[top]
    assert np.allclose(some, expected, atol=1e-6)
    # What is left is the share of |d|² outside the chosen rows.
    left = float(mx.linalg.norm(unit @ some) / mx.linalg.norm(unit @ weight))
    assert left == pytest.approx(1 - float((np.array(unit)[top] ** 2).sum()), abs=1e-5)


def test_plan_and_texts() -> None:
    cases = {i: random_case(seed=i) for i in range(3)}
    weights = {i: c[0] for i, c in cases.items()}
    directions = {i: c[1] for i, c in cases.items() if i != 1}
    surgeon = SparseDirectionSurgeon(auto_sparsity=True)
    plan = surgeon.plan_surgery(weights, directions)
    assert list(plan.per_layer) == [0, 2]
    index = {i: r.refusal_sparsity_index for i, r in plan.per_layer.items()}
    assert plan.mean_refusal_sparsity_index == pytest.approx(sum(index.values()) / 2)
    assert plan.recommended_sparsity == pytest.approx(
        max(0.01, min(0.5, 1 - plan.mean_refusal_sparsity_index))
    )
    assert plan.most_sparse_layer == max(index, key=lambda i: index[i])
    for word in ("recommended sparsity", "most dense layer", "direction is"):
        assert word in surgeon.format_plan(plan)
    assert "energy removed" in surgeon.format_analysis(plan.per_layer[0])
    empty = SparseDirectionSurgeon(0.2).plan_surgery({}, {})
    assert empty.recommended_sparsity == 0.2 and empty.per_layer == {}
    assert plan.to_dict()["per_layer"][0]["layer_idx"] == 0


def test_bad_input() -> None:
    weight, r = random_case()
    surgeon = SparseDirectionSurgeon()
    for call, message in (
        (lambda: SparseDirectionSurgeon(0.0), "sparsity"),
        (lambda: surgeon.apply_sparse_projection(weight, r, 2.0), "sparsity"),
        (lambda: surgeon.analyze_weight_matrix(weight, r, side="rows"), "side"),
        (lambda: surgeon.analyze_weight_matrix(weight, r[:3]), "3 components"),
        (lambda: surgeon.analyze_weight_matrix(weight[None], r), "expected"),
        (lambda: surgeon.analyze_weight_matrix(weight, 0 * r), "is zero"),
        (lambda: surgeon.analyze_weight_matrix(weight, mx.eye(16)[:2]), "expected one"),
        (lambda: surgeon.analyze_weight_matrix(weight.astype(mx.uint32), r), "unpacked"),
        (lambda: surgeon.analyze_weight_matrix("W", r), "weight is 'W'; expected an array"),
        (lambda: surgeon.plan_surgery([weight], [r]), "weights is a list"),
        (lambda: surgeon.plan_surgery({0: weight}, {1: r}), "in common"),
        (lambda: SparseDirectionSurgeon("0.1"), "sparsity is '0.1'"),
    ):
        with pytest.raises(vauban.InputError, match=message):
            call()


def test_numpy_and_lists_are_read_as_mlx_arrays() -> None:
    weight, r = random_case()
    surgeon = SparseDirectionSurgeon(np.float32(0.25))
    whole = surgeon.analyze_weight_matrix(weight, r)
    given = np.array(weight), np.array(r).tolist()
    assert surgeon.analyze_weight_matrix(*given) == whole
    json.dumps(whole.to_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = surgeon.apply_sparse_projection(*given), surgeon.apply_sparse_projection(weight, r)
    assert mx.array_equal(*done)
