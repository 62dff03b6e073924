"""A figure and its change: signs, directions, what does not apply; task accuracy."""

import json
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vauban
from vauban.prompts import LabelledPrompt
from vauban.study import BETTER, Metric, task_accuracy


@given(st.sampled_from(sorted(BETTER)), st.floats(0, 1), st.floats(0, 1))
def test_the_gain_is_positive_where_it_got_better(name: str, a: float, b: float) -> None:
    before = Metric(name, a, 10, (0.0, 1.0), BETTER[name])
    after = Metric(name, b, 10, (0.0, 1.0), BETTER[name])
    delta = after.delta(before)
    assert delta.change == b - a
    better = b > a if BETTER[name] == "higher" else b < a
    assert (delta.gain > 0) == better
    assert -1 <= delta.clipped <= 1
    assert before.delta(after).gain == -delta.gain


def test_gains_are_clipped_to_the_scale_of_the_study() -> None:
    before = Metric("perplexity: pile", 10.0, 100, (9.0, 11.0), "lower")
    delta = Metric("perplexity: pile", 300.0, 100, None, "lower", method="one text").delta(before)
    assert (delta.change, delta.gain, delta.clipped) == (290.0, -290.0, -1.0)
    assert json.loads(json.dumps(delta.to_dict()))["clipped"] == -1.0


def test_what_does_not_apply_is_never_zero() -> None:
    missing = Metric.not_applicable("mmlu", "the organism knows no facts")
    assert missing.value is None and not missing.applies and missing.better == "higher"
    assert "not applicable (the organism knows no facts)" in missing.summary()
    found = Metric.rate("mmlu", 3, 4)
    for delta in (missing.delta(found), found.delta(missing)):
        assert delta.change is delta.gain is delta.clipped is None
    assert json.loads(json.dumps(missing.to_dict()))["value"] is None
    assert Metric.rate("mmlu", 0, 0).reason == "no answers to measure"


def test_rates_have_wilson_intervals_and_known_directions() -> None:
    metric = Metric.rate("non_refusal_harmful", 3, 8)
    assert (metric.value, metric.n, metric.better) == (0.375, 8, "higher")
    assert metric.interval == vauban.wilson_interval(3, 8)
    assert "0.375" in metric.summary() and "higher is better" in metric.summary()
    assert Metric.rate("unsafe_harmful (a guard: mine)", 1, 2).better == "lower"
    with pytest.raises(vauban.InputError, match="no better direction"):
        Metric.rate("beauty", 1, 2)
    assert Metric.rate("beauty", 1, 2, better="higher").value == 0.5


@pytest.mark.parametrize(
    "wrong",
    [
        {"better": "up"},
        {"value": None},
        {"reason": "none"},
        {"value": None, "reason": "none", "interval": (0.0, 1.0)},
        # NaN would be written as null, which reads as "not applicable" without a reason.
        {"value": float("nan")},
    ],
)
def test_contradictions_are_refused(wrong: dict[str, Any]) -> None:
    fields: dict[str, Any] = {
        "name": "mmlu", "value": 0.5, "n": 2, "interval": None, "better": "higher",
    }  # fmt: skip
    with pytest.raises(vauban.InputError):
        Metric(**{**fields, **wrong})


def test_task_accuracy_under_interventions(organism: Any, measured: Any) -> None:
    model, tokenizer = organism
    rows = vauban.load_labelled_prompts(vauban.organism_path("dense") / "prompts" / "eval.jsonl")
    tasks = [row for row in rows if row.kind == "task"][:40]
    mixed = [*tasks, *[row for row in rows if row.kind == "harmful"][:5]]
    found = task_accuracy(model, tokenizer, mixed)
    assert found.n == 40 and found.rate >= 0.85 and found.refused == 0
    assert found.interval == vauban.wilson_interval(found.correct, 40)
    texts = vauban.generate(model, tokenizer, [row.prompt for row in tasks], max_tokens=40)
    assert found.answers == texts
    assert found.right == [t == r["answer"] for t, r in zip(texts, tasks, strict=True)]
    cut = vauban.plan_cut(model, measured).virtual()
    after = task_accuracy(model, tokenizer, tasks, interventions=cut)
    assert found.rate - after.rate <= 0.1
    induced = vauban.Add.from_result(measured, 1.0, positions="all")
    refusing = task_accuracy(model, tokenizer, tasks, interventions=[induced])
    assert refusing.refused >= 5 and refusing.correct + refusing.refused <= 40
    assert refusing.rate < found.rate - 0.1
    noise = vauban.Add(mx.random.normal((128,), key=mx.random.key(0)), 30.0, 2)
    broken = task_accuracy(model, tokenizer, tasks, interventions=[noise])
    assert broken.rate < 0.2
    assert broken.metric().delta(found.metric()).gain == broken.rate - found.rate
    assert json.loads(json.dumps(found.to_dict()))["n"] == 40
    assert "higher is better" in found.summary()


def test_exact_means_to_the_letter(organism: Any) -> None:
    model, tokenizer = organism
    prompt = "Write the opposite of dirty."
    rows = [
        LabelledPrompt(prompt, "harmless", {"answer": answer})
        for answer in (" clean.", "clean", "Clean.")
    ]
    assert task_accuracy(model, tokenizer, rows).right == [True, False, False]
    with pytest.raises(vauban.InputError, match="none of the 1 rows"):
        task_accuracy(model, tokenizer, [LabelledPrompt("x", "harmless")])
