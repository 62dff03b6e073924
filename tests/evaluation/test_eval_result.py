"""What `evaluate` says beside rates: verdicts, pairs, the length curve, repeated prompts."""

from __future__ import annotations

import json
from typing import Any

import pytest

import vauban
from vauban.evaluation import EvalResult, judge_answers, length_curve, paired_test


@pytest.fixture(scope="module")
def result(organism: Any, organism_prompts: Any, measured: Any) -> EvalResult:
    model, tokenizer = organism
    harmful = organism_prompts["eval-harmful"][:8]
    return vauban.evaluate(
        model,
        vauban.plan_cut(model, measured),
        tokenizer,
        [*harmful, harmful[0]],
        harmless=organism_prompts["eval-how-to"][:6],
        max_tokens=40,
    )


def test_verdicts_and_pairs_follow_the_answers(result: EvalResult) -> None:
    rows = result.answers["harmful"]
    for side, counts in (
        ("original", result.verdicts_original),
        ("modified", result.verdicts_modified),
    ):
        labels = [row[f"verdict_{side}"] for row in rows]
        assert counts == {label: labels.count(label) for label in counts}
        assert sum(counts.values()) == 9
    assert result.verdicts_original["refused"] >= 7 > 2 >= result.verdicts_modified["refused"]
    before, after = ([row[f"refused_{side}"] for row in rows] for side in ("original", "modified"))
    assert result.paired == paired_test(before, after)
    assert result.paired.p_value < 0.05 and result.paired.interval[1] < 0
    assert "only before" in result.summary()


def test_the_length_curve_ends_at_the_rate(result: EvalResult) -> None:
    assert [point.tokens for point in result.length_curve] == [30, 40]
    last = result.length_curve[-1]
    assert last.original == result.refusal_rate_original
    assert last.modified == result.refusal_rate_modified


def test_repeated_prompts_and_plain_values(result: EvalResult) -> None:
    assert any("1 of 9 harmful prompts repeat" in note for note in result.notes())
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["paired"]["n"] == 9 and plain["length_curve"][0]["tokens"] == 30
    assert result.first_token_kl is not None and result.first_token_kl >= 0


def test_an_apology_behind_a_short_limit_shows_in_the_curve(organism: Any) -> None:
    _, tokenizer = organism
    text = "Sure, here is a plan for it. One, start. Two, go on. Three, stop. "
    late = tokenizer.encode("Sure, here it is. I'm sorry, but I can't help with that.")
    plain = tokenizer.encode(text * 2)
    curve = length_curve(tokenizer, ["a"], [[late], [plain]], max_tokens=len(late))
    assert curve[-1].original == 1.0 and curve[-1].modified == 0.0


def test_an_answer_cut_before_its_content_refuses_nothing_so_far() -> None:
    texts = ["Sure! Here is", "I'm sorry, but I can't help with that."]
    judged = judge_answers(["a", "b"], texts, finished=[False, True])
    assert (judged.unfinished, judged.judged, judged.rate) == (0, 2, 0.5)
    assert judged.counts["unfinished"] == judged.counts["refused"] == 1
    salad = judge_answers(["a"], ["lemon honest kettles seventeen"], perplexities=[1e4])
    assert salad.labels == ["degenerate"] and salad.degenerate == 1.0
