"""Penalties without a scale, filters as settings, the ledger between batches, and [edit] files."""

import json
from dataclasses import fields
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

import vauban
import vauban.prompts
from tests.knowledge.test_editor import CONTEXTS, FACTS, LAYERS, made, settings
from vauban.cli import main
from vauban.config import EditConfig, load_edit, scaffold
from vauban.config.keys import keys
from vauban.errors import InputError, ModelError
from vauban.knowledge import (
    Editor,
    EditSettings,
    Fact,
    KeyStats,
    Ledger,
    collect_key_stats,
    encode_fact,
    penalty,
    rect,
    sphere,
    target_ids,
)
from vauban.knowledge.penalty import ENERGY
from vauban.knowledge.update_factors import norm_anchored
from vauban.pipeline.edit_facts import moment_texts


@pytest.fixture(scope="module")
def tokenizer(organism):
    return organism[1]


@pytest.fixture(scope="module")
def vocabulary(organism):
    return int(organism[0].model.embed_tokens.weight.shape[0])


@pytest.fixture(scope="module")
def stats():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((400, 96)) * np.logspace(0.2, -1.5, 96)
    moment = mx.array((rows.T @ rows / 400).astype(np.float32))
    return {layer: KeyStats.from_moment(moment, 400, layer) for layer in range(4)}


@pytest.mark.parametrize("method", ["memit", "ridge", "alphaedit"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_auto_gives_a_mean_key_the_same_energy_at_any_scale(method, scale):
    rng = np.random.default_rng(1)
    rows = scale * rng.standard_normal((500, 24)) * np.logspace(0, -1, 24)
    moment = mx.array((rows.T @ rows / 500).astype(np.float32))
    chosen = {"rank": 4} if method == "alphaedit" else {}
    rule = penalty(KeyStats.from_moment(moment, 500, 0), method, **chosen)
    energy = (rule.inverse(rows) * rows).sum(1).mean()
    assert energy == pytest.approx(ENERGY, rel=1e-3)
    assert "auto" not in rule.settings.values() and "auto" not in rule.summary()


def test_a_number_for_lambda_is_taken_as_it_is(stats):
    assert penalty(stats[0], "memit", lam=7.0).scale == 7.0
    with pytest.raises(InputError, match="lam is 'much'"):
        EditSettings(lam="much")


def edited(name, tokenizer, vocabulary, stats, facts=FACTS[:3], **changes):
    model = made(vocabulary)
    editor = Editor(
        model, tokenizer, settings(filter=name, **changes), stats, contexts=CONTEXTS[:1]
    )
    editor.edit(facts)
    return editor


@pytest.mark.parametrize("name", ["rect", "sphere", "project"])
def test_a_filter_acts_on_each_update(name, tokenizer, vocabulary, stats):
    changes = {"rank": 10, "batch_size": 3, "layers": [2]}
    plain = edited(None, tokenizer, vocabulary, stats, **changes)
    other = edited(name, tokenizer, vocabulary, stats, **changes)
    delta = plain.ledger.batches[0].delta(2).astype(np.float32)
    weight = plain.weights.original[2]
    if name == "project":
        _, vectors = np.linalg.eigh(np.array(stats[2].moment, dtype=np.float64))
        basis = vectors[:, -10:]
        expected = delta - delta @ basis @ basis.T
    else:
        expected = np.array({"rect": rect, "sphere": sphere}[name](delta, weight))
    got = other.ledger.batches[0].delta(2)
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
    written = other.weights.current(2) - weight
    assert np.abs(written - got).max() <= 1e-6 + 1e-5 * np.abs(got).max()


def test_prune_is_applied_once_to_the_sum_and_taken_back_for_more(tokenizer, vocabulary, stats):
    changes = {"batch_size": 1, "layers": [2], "lam": 1e-6, "clamp": 90.0}
    plain = edited(None, tokenizer, vocabulary, stats, **changes)
    other = edited("prune", tokenizer, vocabulary, stats, **changes)
    weight = plain.weights.original[2].astype(np.float64)
    total = sum(batch.delta(2) for batch in plain.ledger.batches)
    limit = np.linalg.norm(weight, 2)
    values = np.linalg.svd(total, compute_uv=False)
    assert values[0] > limit, "nothing to prune"
    wanted = np.where(values > limit, np.log(values / limit) + limit, values)
    got = np.linalg.svd(other.weights.current(2) - weight, compute_uv=False)
    assert np.abs(got[:3] - wanted[:3]).max() <= 1e-3 * wanted[0]
    other.undo([fact.id for fact in FACTS[:3]])
    assert np.array_equal(other.weights.current(2), weight)


def test_the_norm_anchor_gives_every_value_one_length():
    rng = np.random.default_rng(2)
    h0, before = rng.standard_normal((2, 4, 8))
    z = h0 + rng.standard_normal((4, 8))
    z[3] += 100 * rng.standard_normal(8)
    anchored, length = norm_anchored(z, h0, before, 3.0)
    lengths = np.linalg.norm(anchored - h0 + before, axis=1)
    assert length == 3.0 and lengths[:3] == pytest.approx(3.0)
    assert np.allclose(anchored[3], h0[3]), "one that wants too much gets no change"


def test_an_ended_sequence_goes_on_from_its_ledger(tokenizer, vocabulary, stats, tmp_path):
    """A stop between two batches: the file holds the first one, as the weights do."""
    path, s = tmp_path / "edits.vauban", settings(batch_size=2)
    whole = Editor(made(vocabulary), tokenizer, s, stats, contexts=CONTEXTS[:1])
    whole.edit(FACTS[:4])

    def stop(stage, done, total):
        raise KeyboardInterrupt

    ended = Editor(made(vocabulary), tokenizer, s, stats, contexts=CONTEXTS[:1])
    with pytest.raises(KeyboardInterrupt):
        ended.edit(FACTS[:4], stop, save_to=path)
    saved = Ledger.load(path)
    assert [fact.id for fact in saved.facts] == ["a", "b"]
    resumed = Editor(made(vocabulary), tokenizer, s, stats)
    resumed.restore(saved)
    for layer in LAYERS:
        assert np.abs(resumed.weights.current(layer) - ended.weights.current(layer)).max() <= 1e-6
    resumed.edit(FACTS[2:4], save_to=path)
    for layer in LAYERS:
        change = whole.weights.current(layer) - whole.weights.original[layer]
        off = np.abs(resumed.weights.current(layer) - whole.weights.current(layer)).max()
        assert off <= 1e-3 * np.abs(change).max()
    assert len(Ledger.load(path).facts) == 4


def test_the_schema_is_the_settings():
    """But for `keep`: settings are the published form, and a run keeps what else is known."""
    listed = {key.name: key for key in keys(EditConfig) if key.section == "edit"}
    assert (listed["keep"].default, EditSettings().keep) == (8, 0)
    for field in fields(EditSettings):
        if field.name not in ("seed", "keep"):
            assert listed[field.name].default == field.default, field.name
    assert listed.keys() - {f.name for f in fields(EditSettings)} == {"facts", "texts", "evaluate"}


def test_an_edit_file_is_read_and_its_slips_are_named(tmp_path):
    path = tmp_path / "edit.toml"
    path.write_text(scaffold("here", EditConfig))
    config = load_edit(path)
    assert config.edit.facts == str(tmp_path / "facts.jsonl") and config.edit.lam == "auto"
    path.write_text('[model]\npath = "a"\n[edit]\nfacts = "f"\nclmap = 2.0\n')
    with pytest.raises(InputError, match=r"line 5: unknown key 'clmap'.*'clamp'"):
        load_edit(path)
    path.write_text('[model]\npath = "a"\n[edit]\nfacts = "f"\nmethod = "rume"\n')
    with pytest.raises(InputError, match=r"method is 'rume'; expected memit_seq"):
        load_edit(path)
    path.write_text('[model]\npath = "a"\n[edit]\nmethod = "rome"\n')
    with pytest.raises(InputError, match="'facts' is missing in \\[edit\\]"):
        load_edit(path)


def test_a_configuration_edits_a_model_and_says_so(tmp_path, capsys):
    facts = tmp_path / "facts.jsonl"
    facts.write_text(
        json.dumps(
            {
                "prompt": "Where is the {} ?", "subject": "lamp", "target_new": "river",
                "target_true": "house", "paraphrases": ["The lamp is in the"],
            }
        )
    )  # fmt: skip
    path = tmp_path / "edit.toml"
    path.write_text(
        f'[model]\npath = "{vauban.organism_path("dense")}"\n[edit]\nfacts = "facts.jsonl"\n'
        'texts = "plain"\nlayers = [2]\nsteps = 6\nclamp = 6.0\n[output]\ndir = "out"\n'
    )
    assert main(["--validate", str(path)]) == 0
    assert main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "1 facts (" in printed and "said freely" in printed
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["evaluation"]["modified"]["efficacy"]["n"] == 1 and run["layers"] == [2]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| Where is the lamp ? | river | house |" in card and "perplexity" in card
    assert Ledger.load(tmp_path / "out").facts[0].target_new == "river"
    assert not list(tmp_path.glob(".out*")), "the ledger beside the output is gone"


def test_facts_that_cannot_be_are_refused_by_name(tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"'The lamp is' holds 0 times \{\}"):
        Fact("The lamp is", "lamp", "red")
    with pytest.raises(InputError, match="target_new is ' '; expected a text that is not empty"):
        Fact("The {} is", "lamp", " ")
    with pytest.raises(InputError, match="subject is ''"):
        Fact("The {} is", "", "red")
    path = tmp_path / "facts.jsonl"
    path.write_text('{"prompt": "The boat is", "subject": "lamp", "target_new": "red"}\n')
    with pytest.raises(InputError, match=r"line 1: subject 'lamp' stands 0 times in prompt"):
        vauban.load_facts(path)
    path.write_text('{"prompt": "The {} is", "subject": "lamp", "target_new": "red"\n')
    with pytest.raises(InputError, match=r"facts.jsonl, line 1: broken JSON"):
        vauban.load_facts(path)
    with pytest.raises(InputError, match=r"target .* gives no tokens"):
        target_ids(SimpleNamespace(encode=lambda text, **_: []), "The lamp is", "red")


def test_a_fact_that_is_true_already_is_said(tokenizer, vocabulary, stats):
    model = made(vocabulary)
    fact = Fact("The {} is in the", "old lamp", "river")
    target = target_ids(tokenizer, fact.text, fact.target_new)[0]
    model.lm_head.bias = mx.zeros(vocabulary).at[target].add(60.0)
    report = Editor(model, tokenizer, settings(), stats, contexts=CONTEXTS[:1]).edit([fact])
    assert report.facts[0].known and report.facts[0].steps == 0
    assert "1 were true already" in report.summary()


def test_a_fact_that_is_not_learnt_leaves_the_weights_alone(tokenizer, vocabulary, stats):
    """No update is made before the last forward pass, so with one step no loss can fall."""
    editor = Editor(made(vocabulary), tokenizer, settings(steps=1), stats, contexts=CONTEXTS[:1])
    report = editor.edit(FACTS[:2])
    assert report.failed == ("a", "b") and report.summary().startswith("0 of 2 facts edited")
    for layer in LAYERS:
        assert np.array_equal(editor.weights.current(layer), editor.weights.original[layer])
    assert editor.ledger.facts == []


def test_nan_in_one_fact_stays_with_it_and_nan_in_the_keys_is_an_error(
    tokenizer, vocabulary, stats
):
    bad, good = made(vocabulary), made(vocabulary)
    rope = tokenizer.encode(" rope", add_special_tokens=False)[-1]
    bad.model.embed_tokens.weight[rope] = float("nan")
    facts = [FACTS[0], Fact("I need a {} to", "rope", "paint", id="c")]
    assert rope in encode_fact(tokenizer, facts[1]).tokens
    editor = Editor(bad, tokenizer, settings(), stats, contexts=CONTEXTS)
    assert editor.edit(facts).failed == ("c",)
    alone = Editor(good, tokenizer, settings(), stats, contexts=CONTEXTS)
    alone.edit(facts[:1])
    for layer in LAYERS:
        change = alone.weights.current(layer) - alone.weights.original[layer]
        off = np.abs(editor.weights.current(layer) - alone.weights.current(layer)).max()
        assert off <= 1e-3 * np.abs(change).max()
    with pytest.raises(ModelError, match="the keys of block 1 hold NaN"):
        collect_key_stats(bad, tokenizer, ["I need a rope to paint."], [1])
    with pytest.raises(InputError, match="NaN"):
        KeyStats.from_moment(mx.full((4, 4), float("nan")), 10, 0)


def test_what_the_moments_are_read_from(tmp_path):
    statements, paragraphs = vauban.prompts.load_texts("facts"), vauban.prompts.load_texts("plain")
    assert moment_texts("facts") == [*statements, *paragraphs]
    assert moment_texts("written") is None
    path = tmp_path / "chats.jsonl"
    path.write_text('{"prompt": "Name a colour.", "completion": "Red."}\n')
    with pytest.raises(InputError, match="expected raw texts, and these are chats"):
        moment_texts(str(path))
    config = tmp_path / "edit.toml"
    config.write_text('[model]\npath = "a"\n[edit]\nfacts = "f"\n')
    assert load_edit(config).edit.texts == "facts"
    config.write_text('[model]\npath = "a"\n[edit]\nfacts = "f"\ntexts = "own.txt"\n')
    assert load_edit(config).edit.texts == str(tmp_path / "own.txt")
