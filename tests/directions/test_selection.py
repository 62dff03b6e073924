"""The selection rule on score files, refusal log-odds and token ids."""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from scipy.special import log_softmax, logit

import vauban
from vauban.directions.refusal_odds import (
    check_mass,
    last_token_kl,
    refusal_log_odds,
    refusal_mass,
)

RUNS = json.loads(Path(__file__).with_name("selection.json").read_text())


def records(run: dict[str, Any]) -> list[dict[str, Any]]:
    names = {"bypass": "refusal_score", "induce": "steering_score", "kl": "kl_div_score"}
    return [
        {"position": r["position"], "layer": r["layer"], **{k: r[n] for k, n in names.items()}}
        for r in run["rows"]
    ]


def by_hand(run: dict[str, Any]) -> list[tuple[int, int]]:
    """The released code's filter and order, written out: survivors, smallest bypass first."""
    kept = []
    for r in run["rows"]:
        if math.isnan(r["refusal_score"]) or r["layer"] >= int(run["layers"] * (1.0 - 0.2)):
            continue
        if r["kl_div_score"] > 0.1 or r["steering_score"] < 0.0:
            continue
        kept.append((r["refusal_score"], r["position"], r["layer"]))
    return [(p, layer) for _, p, layer in sorted(kept, key=lambda row: row[0])]


@pytest.mark.parametrize("name", RUNS)
def test_rule_replays_score_files(name: str) -> None:
    run = RUNS[name]
    found = vauban.select_from_scores(records(run), run["layers"])
    assert [(r["position"], r["layer"]) for r in found.kept] == by_hand(run)
    assert [found.position, found.layer] == run["winner"]
    assert len(found.kept) + len(found.dropped) == len(run["rows"])
    reasons = {(r["position"], r["layer"]): r["reason"] for r in found.dropped}
    first, limit = -len({r["position"] for r in run["rows"]}), int(run["layers"] * 0.8)
    assert reasons[first, 1].startswith("KL 0.1001 above 0.1")
    assert reasons[first, 2].startswith("induce -0.0001 below 0")
    assert reasons[first, limit] == f"residual {limit} is beyond the first {limit}"


def test_order_of_the_records_does_not_matter() -> None:
    run = RUNS["small"]
    rows = records(run)
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    found = vauban.select_from_scores(shuffled, run["layers"])
    assert [found.position, found.layer] == run["winner"]


def test_thresholds_and_missing_scores() -> None:
    def row(layer: int, **scores: Any) -> dict[str, Any]:
        return {"position": -1, "layer": layer, "bypass": 0.0, "induce": 1.0, "kl": 0.0, **scores}

    def choose(*rows: Any, **options: Any) -> Any:
        return vauban.select_from_scores(list(rows), 10, **options)

    assert choose(row(1), row(2, bypass=float("nan")), row(3, bypass=-1.0)).layer == 3
    assert choose(row(1), row(9, bypass=-1.0), prune_layers=0.0).layer == 9
    assert choose(row(1), row(2, bypass=-1.0, kl=5.0), kl_threshold=None).layer == 2
    assert choose(row(1), row(2, bypass=-1.0, induce=-5.0), induce_threshold=None).layer == 2
    # What is out already needs no further score; what is in does.
    assert choose(row(1), row(2, induce=-1.0, kl=None, bypass=None)).layer == 1
    assert (
        choose(row(1), row(2, kl=None, bypass=None, reason="zero")).dropped[0]["reason"] == "zero"
    )
    with pytest.raises(vauban.InputError, match="bypass is None"):
        choose(row(1, bypass=None))
    with pytest.raises(vauban.InputError, match="has no 'kl'"):
        choose({"position": -1, "layer": 0, "bypass": 0.0, "induce": 0.0})
    with pytest.raises(
        vauban.directions.NoCandidate, match=r"2 candidates is left.*best induce -1"
    ):
        choose(row(1, induce=-1.0), row(9, induce=-2.0))
    with pytest.raises(vauban.InputError, match="prune_layers"):
        choose(row(1), prune_layers=1.0)


def test_log_odds_and_kl_against_scipy() -> None:
    logits = mx.random.normal((5, 40), key=mx.random.key(0)) * 4
    other = logits + mx.random.normal((5, 40), key=mx.random.key(1))
    p = np.exp(log_softmax(np.array(logits, dtype=np.float64), axis=-1))
    q = np.exp(log_softmax(np.array(other, dtype=np.float64), axis=-1))
    ids = [3, 17]
    mass = p[:, ids].sum(1)
    assert np.allclose(refusal_mass(logits, ids), mass, rtol=1e-12)
    assert np.allclose(refusal_log_odds(logits, ids), logit(mass), atol=1e-4)
    exact = np.log(mass + 1e-8) - np.log(1 - mass + 1e-8)
    assert np.allclose(refusal_log_odds(logits, ids), exact, atol=1e-12)
    kl = (p * (np.log(p + 1e-6) - np.log(q + 1e-6))).sum(1)
    assert np.allclose(last_token_kl(logits, other), kl, atol=1e-12)
    certain = mx.array([[200.0, 0.0], [0.0, 200.0]])
    assert np.allclose(refusal_log_odds(certain, [0]), [18.42, -18.42], atol=1e-2)


def test_token_ids_are_those_behind_the_generation_prompt(organism: Any) -> None:
    _, tokenizer = organism
    (found,) = vauban.refusal_token_ids(tokenizer, ["I"])
    asked = {"role": "user", "content": "Who are you?"}
    prompt = vauban.encode_chat(tokenizer, [asked])
    answered = vauban.encode_chat(
        tokenizer, [asked, {"role": "assistant", "content": "I am"}], continue_final_message=True
    )
    assert answered[len(prompt)] == found
    several = vauban.refusal_token_ids(tokenizer)
    assert found in several and list(several) == sorted(set(several))
    with pytest.raises(vauban.InputError, match="single token"):
        vauban.refusal_token_ids(tokenizer, ["Incomprehensibilities"])


class Spaced:
    """A tokenizer that gives a word another id behind a line break than at a text's start."""

    chat_template = "{{ messages }}"
    has_chat_template = True
    bos_token_id = None

    def apply_chat_template(
        self, messages: Any, tokenize: bool = True, **options: Any
    ) -> list[int]:
        ids = [1, 2, 3]
        return [*ids, 77] if messages[-1]["role"] == "assistant" else ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [5]


def test_token_ids_depend_on_the_context() -> None:
    assert vauban.refusal_token_ids(Spaced(), ["I"]) == (77,)

    class Stubborn(Spaced):
        """Its template writes something else before an answer than it asks for one with."""

        def apply_chat_template(self, messages: Any, tokenize: bool = True, **options: Any) -> Any:
            return [9, 9, 9, 9] if messages[-1]["role"] == "assistant" else [1, 2, 3]

    assert vauban.refusal_token_ids(Stubborn(), ["I"]) == (5,)


def test_negligible_mass_is_said(organism: Any) -> None:
    _, tokenizer = organism
    logits = mx.zeros((2, 50)).at[:, 7].add(20.0)
    with pytest.warns(vauban.VaubanWarning, match="hold 0.0000 of the first token"):
        text = check_mass(refusal_mass(logits, [3]), logits, [3], tokenizer)
    assert repr(tokenizer.decode([7])) in text
    assert check_mass(refusal_mass(logits, [7]), logits, [7], tokenizer) == ""
