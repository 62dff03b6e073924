"""Causal selection against plain full passes, and the reader that skips untouched blocks."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import vauban
from tests.conftest import TINY, build, random_tokens
from vauban.directions.causal import choose_causally
from vauban.directions.refusal_odds import last_token_kl, refusal_log_odds
from vauban.generation.batching import PromptReader, SharedPrefix, can_skip_blocks
from vauban.interventions import Ablate, Add, Conditional, Project

D = mx.random.normal((64,), key=mx.random.key(3))


@pytest.mark.parametrize("family", [n for n in TINY if n != "llama_bias"])
def test_reading_from_a_block_equals_reading_all(family: str) -> None:
    """With a shared prefix, uneven prompts and every place where a change may begin."""
    model = build(family)
    prompts = [[5, 6, 7, 8, *random_tokens(1, n, seed=n)[0].tolist()] for n in (12, 3, 7)]
    reader = PromptReader(model, prompts, batch_size=2)
    assert reader.recorded == can_skip_blocks(model)

    def full(*changes: Any) -> mx.array:
        return mx.concatenate(
            [
                vauban.forward(model, mx.array([p]), interventions=changes, logits="last").logits
                for p in prompts
            ]
        )[:, 0]

    def close(a: mx.array, b: mx.array) -> bool:
        return float(mx.abs(a - b).max()) <= 1e-4 * float(mx.abs(b).max())

    assert close(reader.baseline, full()) and close(reader.logits(), full())
    for start in range(4):
        for change in (Add(D, 2.0, start), Ablate(D, [start]), Project(D, 2.0, [start, 3])):
            assert close(reader.logits([change], start), full(change)), (start, change)
    assert not close(full(Add(D, 2.0, 1)), full())
    # The blocks are what they were, and so are the recorded streams.
    assert close(reader.logits(), full())
    last = vauban.forward(model, mx.array([prompts[1]])).residual[0, :, 0]
    if reader.recorded:
        assert np.allclose(reader.residual[1], last, atol=1e-4 * float(mx.abs(last).max()))
    with pytest.raises(vauban.InputError, match="whole prompts"):
        reader.logits([Conditional(D, 0.5, Ablate(D), layer=1)])


def test_untouched_blocks_are_not_run() -> None:
    model = build("llama")
    prompts = [[5, 6, *random_tokens(1, n, seed=n)[0].tolist()] for n in (6, 4)]
    reader = PromptReader(model, prompts)
    # Weights that would spoil every pass through blocks 0 and 1.
    for layer in model.layers[:2]:
        layer.mlp.down_proj.weight = layer.mlp.down_proj.weight * float("nan")
    got = reader.logits([Add(D, 0.0, 2)], start=2)
    assert np.allclose(got, reader.baseline, atol=1e-4)
    assert bool(mx.isnan(reader.logits()).any())


def test_readers_read_their_common_prefix_once_per_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two sets, one prefix: what is asked of both under one change reads it once, and rightly."""
    model = build("llama")
    sets = [
        [[5, 6, 7, *random_tokens(1, n, seed=n)[0].tolist()] for n in lengths]
        for lengths in ((9, 4), (6, 11, 3))
    ]
    prefix = SharedPrefix(model, [*sets[0], *sets[1]], record=True)
    assert prefix.tokens == [5, 6, 7]
    readers = [PromptReader(model, lists, prefix=prefix) for lists in sets]
    reads: list[int] = []
    run = SharedPrefix._run

    def counted(self: Any, interventions: Any, start: int) -> Any:
        reads.append(start)
        return run(self, interventions, start)

    monkeypatch.setattr(SharedPrefix, "_run", counted)
    for change, start in ((Ablate(D), 0), (Add(D, 2.0, 2), 2), (Ablate(D, [1]), 1)):
        for reader, lists in zip(readers, sets, strict=True):
            got = reader.logits([change], start)
            expected = mx.concatenate(
                [
                    vauban.forward(model, mx.array([p]), interventions=[change]).logits[:, -1]
                    for p in lists
                ]
            )
            assert float(mx.abs(got - expected).max()) <= 1e-4 * float(mx.abs(expected).max())
    assert reads == [0, 2, 1]
    with pytest.raises(vauban.InputError, match="shared prefix of 3 tokens"):
        PromptReader(model, [[5, 6, 7], [1, 2, 3, 4]], prefix=prefix)


def naive(
    model: Any, tokenizer: Any, key: Any, vector: mx.array, sets: Any, ids: Any, kind: str,
    scope: str, multipliers: Any,
) -> dict[str, float]:  # fmt: skip
    """Every score by a full pass over every prompt on its own."""

    def logits(prompts: Any, *changes: Any) -> mx.array:
        rows = [mx.array([vauban.encode_chat(tokenizer, p)]) for p in prompts]
        return mx.concatenate(
            [vauban.forward(model, t, interventions=changes).logits[:, -1] for t in rows]
        )

    layers = "all" if scope == "all" else [key[1]]
    change = {
        "ablate": lambda: Ablate(vector, layers),
        "project": lambda: Project(vector, 1.0, layers),
        "add": lambda: Add(vector, -1.0, key[1]),
    }[kind]()
    raw = vector if vector.ndim == 1 else vector[0]
    return {
        "bypass": refusal_log_odds(logits(sets[0], change), ids).mean(),
        "kl": last_token_kl(logits(sets[1]), logits(sets[1], change)).mean(),
        "induce": max(
            refusal_log_odds(logits(sets[1], Add(raw, m, key[1])), ids).mean() for m in multipliers
        ),
    }


@pytest.fixture(scope="module")
def offered(organism: Any, organism_prompts: Any) -> Any:
    """Candidates of two positions and the validation prompts, small enough for full passes."""
    model, tokenizer = organism
    harmful, harmless = organism_prompts["harmful"], organism_prompts["harmless"]
    found = vauban.collect_candidates(
        model, tokenizer, harmful[:32], harmless[:32], positions=(-2, -1)
    )
    return found, (harmful[32:38], harmless[32:38])


OPEN = {"kl_threshold": None, "induce_threshold": None, "prune_layers": 0.0}


@pytest.mark.parametrize(
    ("kind", "scope"),
    [("ablate", "all"), ("ablate", "local"), ("project", "all"), ("project", "local"),
     ("add", "local")],
)  # fmt: skip
def test_scores_equal_full_passes(organism: Any, offered: Any, kind: str, scope: str) -> None:
    model, tokenizer = organism
    candidates, sets = offered
    table = {key: v for key, v in candidates.table().items() if key[1] in (1, 3, 4)}
    if kind == "project":
        extra = mx.random.normal((128,), key=mx.random.key(1))
        table = {key: mx.stack([v, extra]) for key, v in table.items()}
    ids = vauban.refusal_token_ids(tokenizer)
    found = vauban.select_direction(
        model, tokenizer, table, *sets, kind=kind, scope=scope, multipliers=(0.5, 1.0), **OPEN
    )
    assert len(found.records) == len(table) == 6
    for record in found.records:
        key = record["position"], record["layer"]
        expected = naive(
            model, tokenizer, key, table[key], sets, ids, kind, scope, (0.5, 1.0)
        )  # fmt: skip
        for name, value in expected.items():
            assert abs(record[name] - value) <= 1e-3 * max(1.0, abs(value)), (key, name)
    best = min(found.records, key=lambda r: r["bypass"])
    assert (found.position, found.layer) == (best["position"], best["layer"])
    assert mx.array_equal(found.direction, table[found.position, found.layer])


def test_needed_scores_choose_the_same(organism: Any, offered: Any) -> None:
    model, tokenizer = organism
    candidates, sets = offered
    # A threshold in the middle of what is measured: some candidates fall at each stage.
    every = vauban.select_direction(model, tokenizer, candidates, *sets, **OPEN)
    known = [r for r in every.records if r["induce"] is not None]
    options = {
        "induce_threshold": float(np.median([r["induce"] for r in known])) - 1e-3,
        "kl_threshold": float(np.quantile([r["kl"] for r in known], 0.8)) + 1e-6,
        "prune_layers": 0.2,
    }
    full = vauban.select_direction(model, tokenizer, candidates, *sets, **options)
    lazy = vauban.select_direction(model, tokenizer, candidates, *sets, scores="needed", **options)
    assert (full.position, full.layer) == (lazy.position, lazy.layer)
    assert [(r["position"], r["layer"]) for r in full.kept] == [
        (r["position"], r["layer"]) for r in lazy.kept
    ]
    assert all(a["bypass"] == pytest.approx(b["bypass"]) for a, b in zip(full.kept, lazy.kept))  # noqa: B905
    scored = {n: sum(r[n] is not None for r in lazy.records) for n in ("induce", "kl", "bypass")}
    assert len(lazy.kept) <= scored["bypass"] < scored["kl"] < scored["induce"] < 12
    assert {n: sum(r[n] is not None for r in full.records) for n in scored} == {
        "induce": 10, "kl": 10, "bypass": 10,
    }  # fmt: skip


def test_rounding_noise_is_no_candidate(organism: Any, offered: Any) -> None:
    """At a template's tokens the embeddings are equal: a difference of 0, or 1e-7 of the norm."""
    model, tokenizer = organism
    candidates, sets = offered
    table = candidates.table()
    size = float(mx.linalg.norm(table[-1, 3]))
    table[-2, 2] = 1e-8 * size * D.tolist()[0] * mx.ones(128)
    found = vauban.select_direction(model, tokenizer, table, *sets, **OPEN)
    zero = {(r["position"], r["layer"]) for r in found.dropped}
    assert zero == {(-2, 0), (-1, 0), (-2, 2)}
    assert all("zero up to rounding" in r["reason"] for r in found.dropped)
    assert all(r["bypass"] is None for r in found.dropped)


def test_wrong_tokens_and_swapped_sets_are_said(organism: Any, offered: Any) -> None:
    model, tokenizer = organism
    candidates, (harmful, harmless) = offered
    table = {(-1, 3): candidates.table()[-1, 3]}
    with pytest.warns(vauban.VaubanWarning, match="first token's probability"):
        found = vauban.select_direction(
            model, tokenizer, table, harmful, harmless, refusal_tokens=[9], **OPEN
        )
    assert found.mass < 0.05 and any("refusal tokens [9]" in w for w in found.warnings)
    with pytest.warns(vauban.VaubanWarning) as raised:
        vauban.select_direction(model, tokenizer, table, harmless, harmful, **OPEN)
    assert any("are the sets in order" in str(w.message) for w in raised)


def test_measure_by_causal_choice(organism: Any, organism_prompts: Any) -> None:
    """Held-out prompts decide, and the chosen direction removes refusal when ablated.

    The organism refuses from residual 4 on, which the usual 20 % would leave out.
    """
    model, tokenizer = organism
    sets = organism_prompts["harmful"], organism_prompts["harmless"]
    found = vauban.measure(
        model, tokenizer, *sets, layer="causal", selection={"prune_layers": 0.15}
    )
    facts = found.provenance["selection"]
    assert found.warnings == () and facts["layer"] == found.residual_index
    assert found.position == facts["position"]
    by_hand = vauban.measure(model, tokenizer, *sets, layer=found.layer_index)
    assert np.allclose(found.direction, by_hand.direction, atol=1e-6)
    prompts = organism_prompts["eval-harmful"][:24]
    refused = [
        sum(
            vauban.is_refusal(answer)
            for answer in vauban.generate(
                model, tokenizer, prompts, max_tokens=16, interventions=changes
            )
        )
        for changes in ([], [Ablate(found.direction)])
    ]
    assert refused[0] >= 20 and refused[1] <= 4
    assert facts["baseline"]["harmful"] > 0 > facts["baseline"]["harmless"]


def test_filters_that_nothing_passes_bend_and_say_how_far(
    organism: Any, organism_prompts: Any
) -> None:
    """The choice is then the filtered one's own rule without the filter, not separation."""
    model, tokenizer = organism
    sets = organism_prompts["harmful"][:24], organism_prompts["harmless"][:24]
    found = vauban.measure(
        model, tokenizer, *sets, layer="causal", selection={"induce_threshold": 99.0}
    )
    without = vauban.measure(
        model, tokenizer, *sets, layer="causal", selection={"induce_threshold": None}
    )
    assert (found.layer_index, found.position) == (without.layer_index, without.position)
    best = without.provenance["selection"]["kept"][0]["induce"]
    (said,) = [w for w in found.warnings if "induce_threshold 99" in w]
    assert f"would need {best:.4g}" in said
    both = {"induce_threshold": 99.0, "kl_threshold": -1.0}
    warned = vauban.measure(model, tokenizer, *sets, layer="causal", selection=both).warnings
    assert any("induce_threshold 99" in w for w in warned)
    assert any("kl_threshold -1" in w for w in warned)
    with pytest.raises(vauban.InputError, match="layer='causal'"):
        vauban.measure(model, tokenizer, *sets, selection={"kl_threshold": 1.0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": {}}, "no candidates"),
        ({"candidates": [1]}, "candidates is a list"),
        ({"candidates": {(-1, 6): mx.ones(128)}}, "0 to 5"),
        ({"candidates": {(-1, 1): mx.ones(64)}}, r"expected \(128,\)"),
        ({"candidates": {(-1, 1): mx.full((128,), float("nan"))}}, "holds NaN"),
        ({"harmful": []}, "harmful validation set is empty"),
        ({"kind": "cut"}, "kind is 'cut'"),
        ({"scope": "some"}, "scope is 'some'"),
        ({"scores": "few"}, "scores is 'few'"),
        ({"multipliers": ()}, "multipliers is empty"),
        ({"refusal_tokens": [99999]}, "ids from 0 to"),
    ],
)
def test_bad_input(organism: Any, arguments: Any, message: str) -> None:
    given = {"candidates": {(-1, 1): mx.ones(128)}, "harmful": ["a"], "harmless": ["b"]}
    with pytest.raises(vauban.InputError, match=message):
        vauban.select_direction(*organism, **{**given, **arguments})


def test_measure_falls_back_where_no_word_of_refusal_is_one_token(
    organism: Any, organism_prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = organism
    sets = organism_prompts["harmful"][:12], organism_prompts["harmless"][:12]
    monkeypatch.setattr(
        "vauban.directions.causal.refusal_token_ids",
        lambda tokenizer: vauban.refusal_token_ids(tokenizer, ["antidisestablishmentarianism"]),
    )
    found = vauban.measure(model, tokenizer, *sets, layer="causal")
    assert found.layer_index == vauban.measure(model, tokenizer, *sets).layer_index
    assert any("is a single token" in w for w in found.warnings)


def test_a_model_of_one_block_has_nothing_to_choose(tiny: Any) -> None:
    """Its only residual is taken, and the result says that nothing was compared."""
    key, found, notes = choose_causally(tiny("llama"), None, {}, ["a"], ["b"], (-1, 1))
    assert key == (-1, 1) and found is None and "one residual" in notes[0]
