"""Penalties without a scale, filters as settings, the ledger between batches, and [edit] files."""

import json
from dataclasses import fields

import mlx.core as mx
import numpy as np
import pytest

import vauban
from tests.knowledge.test_editor import CONTEXTS, FACTS, LAYERS, made, settings
from vauban.cli import main
from vauban.config import EditConfig, load_edit, scaffold
from vauban.config.keys import keys
from vauban.errors import InputError
from vauban.knowledge import Editor, EditSettings, KeyStats, Ledger, penalty, rect, sphere
from vauban.knowledge.penalty import ENERGY
from vauban.knowledge.update_factors import norm_anchored


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
    listed = {key.name: key for key in keys(EditConfig) if key.section == "edit"}
    for field in fields(EditSettings):
        if field.name != "seed":
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
