"""Perplexity of texts and chats: what is scored, how it is weighted, the interval, the sources."""

import json
import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vauban
from tests.study.guards import CHATML, guard_tokenizer, random_guard
from vauban.evaluation import bootstrap_interval
from vauban.evaluation.likelihood import compare_sequences, sequence_losses
from vauban.evaluation.sequences import Scored
from vauban.prompts import answer_chats

TEXTS = [
    "the sea is calm today",
    "a few clouds pass over the bay while boats come home one by one in the evening light",
    "storm and fog",
]


def losses(model: Any, ids: list[int], start: int) -> np.ndarray:
    """float64 losses of ids[start:], each predicted from all before it, in one plain forward."""
    logits = np.array(model(mx.array([ids]))[0].astype(mx.float32), dtype=np.float64)
    logs = logits - logits.max(-1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(-1, keepdims=True))
    return -np.array([logs[t - 1, ids[t]] for t in range(start, len(ids))])


def test_texts_are_scored_from_the_second_token_and_cut() -> None:
    """Special tokens on; the mean is over tokens, not over texts."""
    tokenizer = guard_tokenizer()
    model = random_guard(tokenizer)
    found = vauban.measure_perplexity(model, tokenizer, TEXTS, max_length=12, name="three")
    by_hand = []
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_token_id and len(ids) > 5
        by_hand.append(losses(model, ids[:12], 1))
    every = np.concatenate(by_hand)
    assert (found.texts, found.tokens, found.skipped) == (3, len(every), 0)
    assert math.isclose(found.cross_entropy, every.mean(), rel_tol=1e-5)
    assert math.isclose(found.perplexity, math.exp(every.mean()), rel_tol=1e-5)
    assert not math.isclose(every.mean(), np.mean([x.mean() for x in by_hand]), rel_tol=1e-3)
    for (total, count), hand in zip(found.losses, by_hand, strict=True):
        assert count == len(hand) and math.isclose(total, hand.sum(), rel_tol=1e-5)
    whole = vauban.measure_perplexity(model, tokenizer, TEXTS, max_length=None)
    assert whole.tokens == sum(len(tokenizer.encode(text)) - 1 for text in TEXTS) > found.tokens
    assert math.isclose(
        vauban.perplexity(model, tokenizer, TEXTS, max_length=12), found.perplexity, rel_tol=1e-6
    )


def test_of_a_chat_exactly_the_answer_is_scored() -> None:
    """The first answer token from the template's last one; no end-of-turn token at the end."""
    tokenizer = guard_tokenizer(CHATML)
    model = random_guard(tokenizer)
    chats = [vauban.prompts.texts.chat("Tell me about the sea", answer) for answer in TEXTS]
    found = vauban.measure_perplexity(model, tokenizer, chats, max_length=4)
    head = tokenizer.encode("user\nTell me about the sea</s>assistant\n", add_special_tokens=False)
    assert head[-1] == tokenizer.get_vocab()["\n"]
    by_hand = []
    for answer in TEXTS:
        ids = tokenizer.encode(answer, add_special_tokens=False)
        by_hand.append(losses(model, head + ids, len(head)))
        assert len(by_hand[-1]) == len(ids)
    every = np.concatenate(by_hand)
    assert found.tokens == len(every)
    assert math.isclose(found.cross_entropy, every.mean(), rel_tol=1e-5)


def test_interventions_act_as_the_edited_weights_do(organism: Any, measured: Any) -> None:
    model, tokenizer = organism
    rows = vauban.load_labelled_prompts(vauban.organism_path("dense") / "prompts" / "eval.jsonl")
    chats = answer_chats(rows)[:40]
    assert [c[1]["content"] for c in chats] == [r["answer"] for r in rows if r.kind == "task"][:40]
    plan = vauban.plan_cut(model, measured)
    edited, _ = vauban.load(vauban.organism_path("dense"))
    plan.apply(edited)
    plain = vauban.measure_perplexity(model, tokenizer, chats)
    at_run_time = vauban.measure_perplexity(
        model, tokenizer, chats, interventions=plan.virtual(), name="tasks"
    )
    written = vauban.measure_perplexity(edited, tokenizer, chats)
    assert plain.perplexity < 1.1
    assert abs(at_run_time.cross_entropy - plain.cross_entropy) > 1e-4
    assert math.isclose(at_run_time.cross_entropy, written.cross_entropy, rel_tol=1e-2)
    # The same numbers as the pairwise comparison.
    heads = [vauban.encode_chat(tokenizer, c[0]["content"]) for c in chats]
    ids = [tokenizer.encode(c[1]["content"], add_special_tokens=False) for c in chats]
    pairs = [Scored(h + i, len(h)) for h, i in zip(heads, ids, strict=True)]
    both = compare_sequences(model, model, pairs, plan.virtual())
    assert math.isclose(both.perplexity_original, plain.perplexity, rel_tol=1e-5)
    assert math.isclose(both.perplexity_modified, at_run_time.perplexity, rel_tol=1e-5)
    # Noise in the stream is a worse model.
    noise = vauban.Add(mx.random.normal((128,), key=mx.random.key(0)), 30.0, 2)
    worse = vauban.measure_perplexity(model, tokenizer, chats, interventions=[noise])
    assert worse.perplexity > 2 * plain.perplexity


def test_texts_too_short_are_counted_and_one_text_has_no_interval() -> None:
    tokenizer = guard_tokenizer()
    model = random_guard(tokenizer)
    found = vauban.measure_perplexity(model, tokenizer, ["", TEXTS[0]])
    assert (found.texts, found.skipped, found.interval) == (1, 1, None)
    assert "1 too short" in found.summary() and "one text" in found.method
    assert json.loads(json.dumps(found.to_dict()))["perplexity_interval"] is None
    with pytest.raises(vauban.InputError, match="no tokens"):
        vauban.measure_perplexity(model, tokenizer, [""])
    with pytest.raises(vauban.InputError, match="max_length"):
        vauban.measure_perplexity(model, tokenizer, TEXTS, max_length=1)
    assert sequence_losses(model, [Scored([1], 1)]) == [(0.0, 0)]


def test_the_interval_is_seeded_and_narrows() -> None:
    tokenizer = guard_tokenizer()
    model = random_guard(tokenizer)
    found = vauban.measure_perplexity(model, tokenizer, TEXTS)
    again = vauban.measure_perplexity(model, tokenizer, TEXTS)
    assert found.interval == again.interval and found.interval is not None
    low, high = found.interval
    assert low <= found.cross_entropy <= high and found.perplexity_interval == pytest.approx(
        (math.exp(low), math.exp(high))
    )
    assert "2000 resamples" in found.method


def test_the_bootstrap_covers_the_mean() -> None:
    """Of 200 samples of 40 texts, about 95 % of the intervals hold the true mean per token."""
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        counts = generator.integers(5, 60, 40)
        totals = counts * generator.normal(2.0, 0.3, 40)
        low, high = bootstrap_interval(totals.tolist(), counts.tolist(), resamples=400, seed=seed)
        hits += low <= 2.0 <= high
    assert 176 <= hits <= 199


@given(st.lists(st.tuples(st.floats(0.1, 9), st.integers(1, 50)), min_size=2, max_size=20))
def test_the_bootstrap_stays_within_the_texts(rows: list[tuple[float, int]]) -> None:
    means = [mean for mean, _ in rows]
    low, high = bootstrap_interval([m * n for m, n in rows], [n for _, n in rows], resamples=50)
    assert min(means) - 1e-9 <= low <= high <= max(means) + 1e-9


def test_bootstrap_of_nothing_is_refused() -> None:
    for totals, counts in (([], []), ([1.0], [1]), ([1.0, 2.0], [1]), ([1.0, 2.0], [1, 0])):
        with pytest.raises(vauban.InputError):
            bootstrap_interval(totals, counts)
