"""The editor against the published form of the same steps, and what it promises to users.

The published form is written out plainly: one fact at a time, every row alone, all tokens through
all blocks, updates in the space of the keys in float64.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

import vauban
from tests.conftest import build
from vauban.errors import ArchitectureError, InputError
from vauban.knowledge import (
    Editor,
    EditSettings,
    Fact,
    KeyStats,
    Ledger,
    ValueSettings,
    collect_key_stats,
    encode_fact,
    optimise_values,
    target_ids,
)
from vauban.knowledge.tasks import value_tasks

CONTEXTS = ["{}", "Tell me a colour. {}", "The boat is red. {}"]
TEXTS = ["Tell me the name of a river.", "Where is the old lamp?", "I need help to paint a boat."]
FACTS = [
    Fact("The {} is in the", "old lamp", "river", id="a"),
    Fact("Where is the {} ? It is the", "chisel", "red boat", id="b"),
    Fact("I need a {} to", "rope", "paint", id="c"),
    Fact("Tell me the name of the {} , it is", "boat", "lamp", id="d"),
    Fact("A {} is a", "river", "colour", id="e"),
    Fact("The {} of the boat is", "colour", "red", id="f"),
]
LAYERS = [1, 2]


@pytest.fixture(scope="module")
def tokenizer(organism):
    return organism[1]


def made(vocabulary: int = 2048, **changes):
    """A tiny model whose head is loud enough for its stream to choose a token."""
    model = build("llama", vocab_size=vocabulary, **changes)
    model.lm_head.weight = 12 * model.lm_head.weight
    return model


@pytest.fixture(scope="module")
def vocabulary(organism):
    return int(organism[0].model.embed_tokens.weight.shape[0])


@pytest.fixture(scope="module")
def stats(tokenizer, vocabulary):
    rng = np.random.default_rng(0)
    found = {}
    for layer in range(4):
        rows = rng.standard_normal((400, 96)) * np.logspace(0.2, -1.5, 96)
        moment = mx.array((rows.T @ rows / 400).astype(np.float32))
        found[layer] = KeyStats.from_moment(moment, 400, layer)
    return found


def settings(**changes) -> EditSettings:
    return EditSettings(**{"layers": LAYERS, "steps": 8, "lr": 0.2, "lam": 20.0, **changes})


# The published form.


def run(model, tokens: Sequence[int], at: int = -1, pivot: int = 0, delta=None):
    """Logits (T, V), and by block the stream behind it and the MLP's inner keys."""
    x = model.model.embed_tokens(mx.array([list(tokens)]))
    streams, keys = [], []
    for index, layer in enumerate(model.model.layers):
        h = x + layer.self_attn(layer.input_layernorm(x), "causal", None)
        y = layer.post_attention_layernorm(h)
        inner = mx.sigmoid(layer.mlp.gate_proj(y)) * layer.mlp.gate_proj(y) * layer.mlp.up_proj(y)
        x = h + layer.mlp.down_proj(inner)
        if index == at and delta is not None:
            x = x + (mx.arange(len(tokens)) == pivot)[None, :, None] * delta
        streams.append(x[0])
        keys.append(inner[0])
    return model.lm_head(model.model.norm(x))[0], streams, keys


def published_value(model, tokenizer, fact, s, layer, more=()):
    """`more` rows are kept as "{subject} is a" is, by the mean over the tokens behind the first."""
    target = list(target_ids(tokenizer, fact.text, fact.target_new))
    rows = [encode_fact(tokenizer, fact, context) for context in CONTEXTS]
    kl = encode_fact(tokenizer, Fact("{} is a", fact.subject, "x"))
    kept = [(kl.tokens, kl.pivot, [kl.pivot])]
    kept += [(row.tokens, row.pivot, range(row.pivot + 1, len(row.tokens))) for row in more]
    h0 = run(model, rows[0].tokens)[1][layer][rows[0].pivot]
    norm = float(mx.linalg.norm(h0))
    delta = mx.zeros(h0.shape)
    mean, square = mx.zeros(h0.shape), mx.zeros(h0.shape)

    def loss(d):
        total = 0.0
        for row in rows:
            logits = run(model, [*row.tokens, *target[:-1]], layer, row.pivot, d)[0]
            logs = logits - mx.logsumexp(logits, -1, keepdims=True)
            for i, token in enumerate(target):
                total = total - logs[len(row.tokens) - 1 + i, token] / len(target) / len(rows)
        for (tokens, pivot, places), said in zip(kept, before, strict=True):
            logits = run(model, tokens, layer, pivot, d)[0]
            for place in places:
                logs = logits[place] - mx.logsumexp(logits[place])
                apart = (mx.exp(logs) * (logs - said[place])).sum()
                total = total + s.kl_factor * apart / len(places)
        return total + s.weight_decay * mx.sqrt((d**2).sum() + 1e-20) / norm**2

    before = [run(model, tokens)[0] for tokens, _, _ in kept]
    before = [logits - mx.logsumexp(logits, axis=-1, keepdims=True) for logits in before]
    for step in range(s.steps):
        value, slope = mx.value_and_grad(loss)(delta)
        if float(value) < 5e-2 or step == s.steps - 1:
            break
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        hat = mx.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8
        delta = delta - s.lr * mean / (1 - 0.9 ** (step + 1)) / hat
        size = float(mx.linalg.norm(delta))
        if size > s.clamp * norm:
            delta = delta * (s.clamp * norm / size)
        mx.eval(delta, mean, square)
    return np.array(h0 + delta, dtype=np.float64)


def published_keys(model, tokenizer, facts, layer):
    rows = []
    for fact in facts:
        each = []
        for context in CONTEXTS:
            row = encode_fact(tokenizer, fact, context)
            each.append(np.array(run(model, row.tokens)[2][layer][row.pivot], dtype=np.float64))
        rows.append(0.5 * each[0] + 0.5 * np.mean(each[1:], axis=0))
    return np.array(rows)


def published_edit(model, tokenizer, batches, s, stats):
    """Edit in place; the updates of each batch by layer, and the values."""
    cache = {layer: np.zeros((96, 96)) for layer in LAYERS}
    updates, values = [], []
    for facts in batches:
        z = np.array([published_value(model, tokenizer, f, s, LAYERS[-1]) for f in facts])
        values.append(z)
        for number, layer in enumerate(LAYERS):
            k = published_keys(model, tokenizer, facts, layer)
            ends = [encode_fact(tokenizer, f) for f in facts]
            h = [run(model, row.tokens)[1][LAYERS[-1]][row.pivot] for row in ends]
            r = (z - np.array(mx.stack(h), dtype=np.float64)) / (len(LAYERS) - number)
            c = np.array(stats[layer].moment, dtype=np.float64)
            if s.method == "alphaedit":
                eigenvalues, vectors = np.linalg.eigh(c)
                null = vectors[:, eigenvalues < s.tau]
                p = null @ null.T
                system = p @ (k.T @ k + cache[layer]) + s.l2 * np.eye(96)
                delta = np.linalg.solve(system, p @ k.T @ r).T
            else:
                system = s.lam * c + cache[layer] + k.T @ k
                delta = np.linalg.solve(system, k.T @ r).T
            module = model.model.layers[layer].mlp.down_proj
            module.weight = module.weight + mx.array(delta.astype(np.float32))
            updates.append(delta)
        for layer in LAYERS:
            k = published_keys(model, tokenizer, facts, layer)
            cache[layer] += k.T @ k
    return updates, values


@pytest.mark.parametrize("method", ["alphaedit", "memit_seq"])
def test_three_batches_are_those_of_the_published_form(method, tokenizer, vocabulary, stats):
    s = settings(method=method, batch_size=2, l2=2.0)
    plain, ours = made(vocabulary), made(vocabulary)
    batches = [FACTS[:2], FACTS[2:4], FACTS[4:]]
    updates, values = published_edit(plain, tokenizer, batches, s, stats)
    editor = Editor(ours, tokenizer, s, stats, contexts=CONTEXTS)
    report = editor.edit(FACTS)
    assert not report.failed
    for z, batch in zip(values, editor.ledger.batches, strict=True):
        assert np.abs(batch.values - z).max() <= 1e-4
    expected = iter(updates)
    for batch in editor.ledger.batches:
        for layer in LAYERS:
            delta = next(expected)
            assert np.abs(batch.delta(layer) - delta).max() <= 1e-3 * np.abs(delta).max()


@pytest.mark.parametrize("keep", [0, 4])
def test_values_do_not_depend_on_the_batch_the_prefix_or_padding(keep, tokenizer, vocabulary):
    model = made(vocabulary)
    tasks = value_tasks(model, tokenizer, FACTS, CONTEXTS, keep)
    chosen = ValueSettings(8, 0.2, 0.5, 0.0625, 0.75)
    together = optimise_values(model, 2, tasks, chosen)
    for task, value in zip(tasks, together, strict=True):
        for prefix in (True, False):
            s = ValueSettings(8, 0.2, 0.5, 0.0625, 0.75, "loss", prefix)
            alone = optimise_values(model, 2, [task], s)[0]
            assert np.abs(alone.z - value.z).max() <= 1e-4
            assert alone.steps == value.steps == 7


def test_a_learnt_fact_stops_and_a_bound_is_kept(tokenizer, vocabulary):
    model = made(vocabulary)
    facts = [Fact("The {}", word, "river") for word in ("lamp", "boat")]
    tasks = value_tasks(model, tokenizer, facts, CONTEXTS, 0)
    free = optimise_values(model, 3, tasks, ValueSettings(60, 0.5, 0.0, 0.0, 50.0))
    hits = optimise_values(model, 3, tasks, ValueSettings(60, 0.5, 0.0, 0.0, 50.0, "argmax"))
    for value, early in zip(free, hits, strict=True):
        assert value.loss < 0.05 and value.steps < 59 and 2 <= early.steps < 59
    for value in optimise_values(model, 2, tasks, ValueSettings(20, 0.5, 0.0, 0.0, 0.3)):
        assert np.linalg.norm(value.z - value.h0) <= 0.3001 * np.linalg.norm(value.h0)


@pytest.mark.parametrize("family", ["gemma", "granite", "llama_bias", "qwen3"])
def test_an_edit_teaches_other_families_too(family, tokenizer, vocabulary, stats):
    model = build(family, vocab_size=vocabulary)
    change = {"steps": 20, "lr": 0.5, "clamp": 9.0, "weight_decay": 0.0, "keep": 2}
    s = settings(**change, method="ridge", l2=1e-3)
    report = Editor(model, tokenizer, s, stats, contexts=CONTEXTS).edit(FACTS[:3])
    assert all(fact.after > 1.02 * fact.before for fact in report.facts)


@pytest.mark.parametrize("keep", [0, 3])
def test_undo_is_never_edited(keep, tokenizer, vocabulary, stats):
    s = settings(batch_size=2, keep=keep)
    model, other = made(vocabulary), made(vocabulary)
    start = {layer: model.model.layers[layer].mlp.down_proj.weight for layer in LAYERS}
    editor = Editor(model, tokenizer, s, stats, contexts=CONTEXTS)
    editor.edit(FACTS)
    editor.undo(["b", "c"])
    never = Editor(other, tokenizer, s, stats, contexts=CONTEXTS)
    for part in ([FACTS[0]], [FACTS[3]], FACTS[4:]):
        never.edit(part)
    for layer in LAYERS:
        a, b = (m.model.layers[layer].mlp.down_proj.weight for m in (model, other))
        assert float(mx.abs(a - b).max()) <= 1e-3 * float(mx.abs(b - start[layer]).max())
    editor.undo([fact.id for fact in editor.ledger.facts])
    for layer in LAYERS:
        weight = model.model.layers[layer].mlp.down_proj.weight
        assert mx.array_equal(weight, start[layer])
    with pytest.raises(InputError, match="no fact with the id"):
        editor.undo("b")


def test_undo_at_one_layer_with_kept_values_is_the_joint_solution(tokenizer, vocabulary, stats):
    s = settings(layers=[2], batch_size=1)
    model = made(vocabulary)
    editor = Editor(model, tokenizer, s, stats, contexts=["{}"])
    editor.edit(FACTS)
    joined = editor.ledger.batches
    keys = np.concatenate([b.keys[2] for b in joined[:1] + joined[2:]])
    # One layer, one context: Δ K = Z - H0 is solved jointly, whatever the order.
    h = np.concatenate([b.values - b.plain for b in joined[:1] + joined[2:]])
    moved = np.concatenate([b.plain for b in joined[:1] + joined[2:]])
    ends = [encode_fact(tokenizer, fact) for fact in FACTS[:1] + FACTS[2:]]
    fresh = made(vocabulary)
    streams = [run(fresh, row.tokens)[1][2][row.pivot] for row in ends]
    first = np.array(mx.stack(streams), dtype=np.float64)
    wanted = h + moved - first
    c = np.array(stats[2].moment, dtype=np.float64)
    expected = wanted.T @ keys @ np.linalg.inv(keys.T @ keys + s.lam * c)
    editor.undo("b", values="kept")
    total = sum(batch.delta(2) for batch in editor.ledger.batches)
    assert np.abs(total - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_ledger_is_read_again_and_replayed(tokenizer, vocabulary, stats, tmp_path):
    model = made(vocabulary)
    editor = Editor(model, tokenizer, settings(), stats, contexts=CONTEXTS)
    editor.edit(FACTS[:3])
    ledger = Ledger.load(editor.ledger.save(tmp_path / "edits.vauban"))
    assert ledger.to_dict() == editor.ledger.to_dict()
    again, replayed = made(vocabulary), made(vocabulary)
    Editor(again, tokenizer, settings(), stats, contexts=CONTEXTS).restore(ledger)
    Editor(replayed, tokenizer, settings(), stats).replay(ledger)
    for other in (again, replayed):
        for layer in LAYERS:
            a, b = (m.model.layers[layer].mlp.down_proj.weight for m in (model, other))
            assert float(mx.abs(a - b).max()) <= 1e-5
    with pytest.raises(InputError, match="another model"):
        Editor(made(vocabulary, seed=3), tokenizer, settings(), stats).restore(ledger)


def test_key_statistics_are_the_mean_over_all_tokens_and_resume(tokenizer, vocabulary, tmp_path):
    model = made(vocabulary)
    texts = TEXTS * 2
    found = collect_key_stats(model, tokenizer, texts, LAYERS, folder=tmp_path)
    rows = [run(model, tokenizer.encode(text))[2] for text in texts]
    for layer in LAYERS:
        k = np.concatenate([np.array(keys[layer], dtype=np.float64) for keys in rows])
        expected = k.T @ k / len(k)
        assert found[layer].count == len(k)
        assert np.abs(np.array(found[layer].moment) - expected).max() <= 1e-5 * expected.max()
    calls = []
    again = collect_key_stats(
        model, tokenizer, texts, LAYERS, folder=tmp_path, progress=lambda *a: calls.append(a)
    )
    assert mx.array_equal(again[1].moment, found[1].moment)
    with pytest.raises(InputError, match="another model"):
        Editor(made(vocabulary, seed=5), tokenizer, settings(), found)
    assert collect_key_stats(model, tokenizer, texts, [1], max_tokens=7)[1].count == 7
    told = []
    written = collect_key_stats(
        model, tokenizer, None, [1], max_tokens=100, progress=lambda *call: told.append(call)
    )
    assert written[1].count == 100 and told[0][0].startswith("the model writes 100 tokens, about ")
    assert ("write texts", 100, 100) in told
    again = collect_key_stats(model, tokenizer, None, [1], max_tokens=100)[1]
    assert mx.array_equal(again.moment, written[1].moment)
    assert collect_key_stats(model, tokenizer, None, [1])[1].count == 4 * 96


def test_bad_input_is_named(tokenizer, vocabulary, stats, tmp_path):
    model = made(vocabulary)
    with pytest.raises(InputError, match="block 9 does not exist"):
        Editor(model, tokenizer, settings(layers=[9]), stats)
    with pytest.raises(ArchitectureError, match="expert"):
        Editor(build("qwen3_moe", vocab_size=vocabulary), tokenizer, settings(), stats)
    with pytest.raises(InputError, match="no key statistics of block 2"):
        Editor(model, tokenizer, settings(), {1: stats[1]})
    with pytest.raises(InputError, match="those of block 3"):
        Editor(model, tokenizer, settings(), {1: stats[3], 2: stats[2]})
    editor = Editor(model, tokenizer, settings(), stats, contexts=CONTEXTS)
    with pytest.raises(InputError, match="one target a prompt"):
        editor.edit([Fact("The {} is", "lamp", "red"), Fact("The {} is", "lamp", "old")])
    with pytest.raises(InputError, match=r"2 times \{\}|holds 2"):
        Fact("{} and {}", "lamp", "red")
    path = tmp_path / "facts.jsonl"
    path.write_text('{"prompt": "The {} is", "subject": "lamp", "target_new": "red"}\n{"a": 1}\n')
    with pytest.raises(InputError, match=r"facts.jsonl, line 2: the key 'prompt' is missing"):
        vauban.load_facts(path)
    with pytest.raises(InputError, match="cut by tokenisation"):
        encode_fact(tokenizer, Fact("The {}amp is", "l", "red"))


def test_facts_are_read_from_the_known_formats(tmp_path):
    rewrite = {
        "prompt": "The {} is", "subject": "lamp", "target_new": {"str": "red"},
        "target_true": {"str": "old"},
    }  # fmt: skip
    import json

    path = tmp_path / "counterfact.json"
    path.write_text(json.dumps([{
        "case_id": 7, "requested_rewrite": rewrite, "paraphrase_prompts": ["A lamp is"],
        "neighborhood_prompts": ["The boat is"],
    }]))  # fmt: skip
    fact = vauban.load_facts(path)[0]
    assert fact == Fact("The {} is", "lamp", "red", "old", ("A lamp is",), ("The boat is",), "7")
    path.write_text(
        '{"src": "Who owns the lamp?", "subject": "lamp", "alt": "Ann", "answers": ["Bo"],'
        ' "rephrase": "Whose is the lamp?"}'
    )
    fact = vauban.load_facts(path)[0]
    assert fact.prompt == "Who owns the {}?" and fact.target_true == "Bo"
