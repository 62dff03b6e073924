"""Which rows are keys, which of them count as energy, and what a protected plan reports."""

import json
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import vauban
from tests.architectures.build import build as build_family
from tests.conftest import build
from tests.edits.test_null_space import Letters
from vauban.edits import Preserve, collect_preservation_keys, protection_report
from vauban.edits.modules import module_weight
from vauban.models import module_inputs

# Long enough that mlx-lm sorts the routed rows by expert.
PROMPTS = ["a first prompt of some forty characters", "another one, shorter"]
pytestmark = pytest.mark.filterwarnings("ignore:.*no chat template")


def energy(model: nn.Module, tokens: list[int]) -> dict[str, float]:
    """Σ |x|² of what each writer reads in one pass."""
    found: dict[str, float] = {}

    def read(path: str, rows: mx.array, experts: mx.array | None) -> None:
        found[path] = found.get(path, 0.0) + float((rows**2).sum())

    paths = [w.path for w in vauban.residual_writers(model) if w.layer >= 0]
    with module_inputs(model, paths, read):
        mx.eval(model(mx.array([tokens])))
    return found


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "dbrx", "mixtral", "deepseek_v2"])
def test_the_first_token_is_a_key_and_no_energy(name: str) -> None:
    """Also of experts, whose rows come sorted (stacked) or one by one (DBRX)."""
    model, tokenizer = build_family(name), Letters()
    keys = collect_preservation_keys(model, tokenizer, PROMPTS).keys
    lists = [tokenizer.encode(p) for p in PROMPTS]
    every = [energy(model, tokens) for tokens in lists]
    first = [energy(model, tokens[:1]) for tokens in lists]
    checked = 0
    for writer in vauban.residual_writers(model):
        if writer.layer < 0:
            continue
        own = [k for k in keys[writer.path] if k is not None]
        held = sum(float((k.factor**2).sum()) for k in own)
        counted = sum(float((k.counted**2).sum()) for k in own)
        whole = sum(e.get(writer.path, 0.0) for e in every)
        starts = sum(e.get(writer.path, 0.0) for e in first)
        assert np.isclose(held, whole, rtol=1e-3), writer.path
        assert np.isclose(counted, whole - starts, rtol=1e-3, atol=1e-4 * whole), writer.path
        checked += starts > 0.005 * whole
    assert checked >= 4


def test_experts_that_are_modules_keep_what_was_preserved() -> None:
    model, tokenizer = build_family("dbrx"), Letters()
    keys = collect_preservation_keys(model, tokenizer, ["ab cd"])
    routed = [k[0].rows for path, k in keys.keys.items() if ".experts." in path and k[0]]
    assert sum(routed) == 5 * 2 * len(model.layers)
    plan = vauban.plan_cut(model, mx.random.normal((64,)), preserve=Preserve(keys, energy=1.0))
    for text, kept in (("ab cd", True), ("xyz uvw", False)):
        tokens = mx.array([tokenizer.encode(text)])
        before = vauban.forward(model, tokens).logits
        after = vauban.forward(model, tokens, interventions=plan.virtual()).logits
        assert (mx.abs(after - before).max().item() <= 1e-4) == kept


def test_an_input_is_long_beside_those_of_all_experts() -> None:
    from vauban.edits.preservation_keys import _Rows

    model = build_family("dbrx")
    writers = {w.path: w for w in vauban.residual_writers(model) if w.kind == "expert"}
    paths = [p for p, w in writers.items() if w.layer == 0]
    rows = _Rows(writers)
    rows.first = [False] * 8
    for i in range(8):
        long = 100.0 if i == 3 else 1.0
        rows.read(paths[i % 4], long * mx.ones((1, writers[paths[0]].shape[-1])), None)
    rows.take()
    (with_long,), (without,) = rows.keys(writers[paths[3]]), rows.keys(writers[paths[0]])
    assert with_long is not None and without is not None
    assert (with_long.rows, len(with_long.counted)) == (2, 1)
    assert (without.rows, len(without.counted)) == (2, 2)


@pytest.fixture(scope="module")
def protected() -> dict[str, Any]:
    model = build("qwen3_moe")
    kept = collect_preservation_keys(model, Letters(), ["ab", "cd"])
    other = collect_preservation_keys(model, Letters(), ["the other prompt"])
    d = mx.random.normal((64,), key=mx.random.key(0))
    options = {"project": {}, "least_squares": {"targets": other}}
    plans = {
        mode: vauban.plan_cut(model, d, preserve=Preserve(kept, energy=1.0, mode=mode, **more))
        for mode, more in options.items()
    }
    return {"kept": kept, "other": other, "plans": plans, "model": model, "d": d}


@pytest.mark.parametrize("mode", ["project", "least_squares"])
def test_the_report_says_what_is_kept_and_what_is_cut(protected: Any, mode: str) -> None:
    plan = protected["plans"][mode]
    report = protection_report(plan, protected["kept"])
    assert set(report.writers) == {u.path for u in plan.updates}
    assert report.worst_leak <= 1e-5
    shapes = {w.path: w.shape for w in vauban.residual_writers(plan.model)}
    for path, found in report.writers.items():
        assert found.removable > 0 and found.width == shapes[path][-1]
    if mode == "project":
        assert all(w.removable < 1 for w in report.writers.values())
    elsewhere = protection_report(plan, protected["other"])
    assert elsewhere.worst_leak > 0.1
    assert elsewhere.mean_removable == report.mean_removable
    assert json.loads(json.dumps(report.to_dict()))["prompts"] == 2
    assert "leak at most" in report.summary() and plan.updates[0].path in report.summary()


def test_the_reported_figures_are_those_of_the_definitions(protected: Any) -> None:
    """METHODS: removable share |P r|²/|r|²; leak against the rows themselves."""
    model, plan = protected["model"], protected["plans"]["project"]
    update = next(u for u in plan.updates if u.kind == "attention")
    seen: list[mx.array] = []
    with module_inputs(model, [update.path], lambda path, rows, experts: seen.append(rows)):
        mx.eval(model(mx.array([Letters().encode("the other prompt")])))
    weight = module_weight(dict(model.named_modules())[update.path])
    removed, taken = update.removed(weight), update.taken(weight)
    found = protection_report(plan, protected["other"]).writers[update.path]
    ratio = mx.linalg.norm(seen[0] @ taken.T) / mx.linalg.norm(seen[0] @ removed.T)
    assert np.isclose(found.leak, ratio.item(), rtol=1e-3)
    share = (mx.linalg.norm(taken) / mx.linalg.norm(removed)).item() ** 2
    assert np.isclose(found.removable, share, rtol=1e-4)
    assert (found.rank, found.width) == (4, weight.shape[-1])


def test_reports_and_protections_refuse(protected: Any) -> None:
    model, kept = protected["model"], protected["kept"]
    with pytest.raises(vauban.InputError, match="protects nothing"):
        protection_report(vauban.plan_cut(model, protected["d"]), kept)
    one = collect_preservation_keys(model, Letters(), ["ab"], ["model.layers.0.self_attn.o_proj"])
    with pytest.raises(vauban.InputError, match="no keys were collected for"):
        protection_report(protected["plans"]["project"], one)
    for options, message in (
        ({"keys": mx.zeros((2, 64))}, "keys is a array"),
        ({"keys": kept, "targets": [1]}, "targets is a list"),
        ({"keys": kept, "limit": 0}, "limit is 0"),
        ({"keys": kept, "limit": float("nan")}, "limit is nan"),
    ):
        with pytest.raises(vauban.InputError, match=message):
            Preserve(**options)
