"""Edited facts in a folder that mlx-lm opens, float and packed; what their evaluation counts."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load as mlx_load

import vauban
from vauban.evaluation.facts import target_scores
from vauban.evaluation.hidden_shift import shift_of
from vauban.export.fact_edits import key_loss
from vauban.knowledge import Editor, EditSettings, Fact, Ledger, encode_fact, target_ids

FACTS = [
    Fact("Where is the {} ?", "lamp", "river", "house", ("The lamp is in the",), ("The boat is",)),
    Fact("I need a {} to", "rope", "paint", "boat"),
    Fact("Tell me the name of the {} , it is", "boat", "lamp"),
]


def edited(kind: str, **changes):
    model, tokenizer = vauban.load(vauban.organism_path(kind))
    texts = vauban.load_prompts(vauban.organism_path("dense") / "prompts" / "harmless.jsonl")[:40]
    stats = vauban.collect_key_stats(model, tokenizer, texts, [2, 3])
    options = {"layers": [2, 3], "steps": 25, "clamp": 6.0, "lam": 1.0, "weight_decay": 0.0}
    settings = EditSettings(**{**options, **changes})
    editor = Editor(model, tokenizer, settings, stats, contexts=["{}", "Good morning. {}"])
    return editor, editor.edit(FACTS)


@pytest.fixture(scope="module")
def dense():
    return edited("dense")


def test_a_float_folder_is_the_model_in_memory(dense, tmp_path):
    editor, report = dense
    assert all(fact.after > 3 * fact.before for fact in report.facts)
    folder = editor.export(vauban.organism_path("dense"), tmp_path / "out")
    again, tokenizer = mlx_load(str(folder))
    tokens = mx.array([encode_fact(tokenizer, FACTS[0]).tokens])
    a, b = (m(tokens).astype(mx.float32) for m in (again, editor.model))
    assert float(mx.abs(a - b).max()) <= 0.02 * float(mx.abs(b).max())
    assert Ledger.load(folder).facts == editor.ledger.facts
    assert not [f for f in folder.rglob("*.safetensors") if not f.name.startswith("model")]


@pytest.mark.parametrize("precision", [None, "8bit", "float"])
def test_a_packed_folder_keeps_the_edits_on_their_keys(precision, tmp_path):
    editor, report = edited("4bit")
    folder = editor.export(vauban.organism_path("4bit"), tmp_path / "out", precision)
    again, tokenizer = vauban.load(folder)
    for layer, module in editor.modules.items():
        stored = dict(again.named_modules())[module.path]
        if precision != "float":
            assert stored.bits in ((8,) if precision else (4, 8))
            read = mx.dequantize(
                stored.weight, stored.scales, stored.biases, stored.group_size, stored.bits
            )
        else:
            read = stored.weight
        keys = np.concatenate([batch.kept[layer] for batch in editor.ledger.batches])
        target, before = editor.weights.current(layer), editor.weights.original[layer]
        loss = key_loss(np.array(read.astype(mx.float32)), target, before, keys)
        assert loss <= (0.05 if precision != "float" else 0.02)
    for fact, told in zip(FACTS, report.facts, strict=True):
        nll, _ = target_scores(again, tokenizer, [(fact.text, fact.target_new)])[0]
        ids = target_ids(tokenizer, fact.text, fact.target_new)
        before, after = (-np.log(p) / len(ids) for p in (told.before, told.after))
        assert before - nll >= 0.7 * (before - after)


def test_facts_are_counted_by_probability_by_rank_and_in_free_text(dense):
    editor, _ = dense
    original, tokenizer = vauban.load(vauban.organism_path("dense"))
    result = vauban.evaluate_facts(original, editor.model, tokenizer, FACTS, max_tokens=3)
    assert result.modified.efficacy.n == 2 and result.modified.paraphrase.n == 1
    assert result.modified.efficacy_strict.n == 3
    nll, likeliest = target_scores(editor.model, tokenizer, [(FACTS[1].text, "paint")])[0]
    tokens = [*tokenizer.encode(FACTS[1].text), *target_ids(tokenizer, FACTS[1].text, "paint")]
    logits = editor.model(mx.array([tokens])).astype(mx.float32)[0]
    ids = target_ids(tokenizer, FACTS[1].text, "paint")
    steps = logits[len(tokens) - len(ids) - 1 : -1]
    logs = np.array(steps - mx.logsumexp(steps, -1, keepdims=True))
    assert nll == pytest.approx(-logs[np.arange(len(ids)), list(ids)].mean(), abs=1e-4)
    assert likeliest == bool((logs.argmax(-1) == list(ids)).all())
    same = vauban.evaluate_facts(original, original, tokenizer, FACTS, generate=False)
    assert same.original == same.modified and same.original.exact.n == 0
    assert "efficacy" in result.summary() and result.to_dict()["facts"] == 3


def test_a_shift_is_nothing_for_one_model_and_grows_with_a_change(dense):
    editor, _ = dense
    original, tokenizer = vauban.load(vauban.organism_path("dense"))
    prompts = [f"Where is the {word}" for word in ("lamp", "rope", "boat", "river", "house")]
    still = vauban.hidden_shift(original, original, tokenizer, prompts, 3)
    moved = vauban.hidden_shift(original, editor.model, tokenizer, prompts, 3)
    assert still.relative == 0 and still.cka == pytest.approx(1) and still.overlap == (1, 1)
    assert moved.relative > 0.01
    rng = np.random.default_rng(0)
    before = rng.standard_normal((4000, 2)) * [3.0, 1.0]
    assert shift_of(before, before).inside == pytest.approx(0.95, abs=0.01)
    far = shift_of(before, before + np.array([30.0, 0.0]))
    assert far.inside == 0 and far.overlap[0] == 0 and far.cka == pytest.approx(1)


def test_the_command_edits_and_takes_out_again(tmp_path, capsys, monkeypatch):
    from vauban.cli import main

    monkeypatch.chdir(tmp_path)
    lines = ['{"prompt": "Where is the {} ?", "subject": "lamp", "target_new": "river"}',
             '{"prompt": "I need a {} to", "subject": "rope", "target_new": "paint"}']  # fmt: skip
    (tmp_path / "facts.jsonl").write_text("\n".join(lines))
    model = str(vauban.organism_path("dense"))
    flags = ["--layers", "2", "--lam", "1", "--clamp", "6", "--steps", "6", "-o", "out"]
    assert main(["edit", model, "facts.jsonl", *flags]) == 0
    assert "2 of 2 facts edited" in capsys.readouterr().out
    assert main(["edit", "--undo", "1", "2", "out"]) == 0
    said = capsys.readouterr().out
    assert "taken out: 1, 2" in said and "no other fact had to be edited again" in said
    assert "0 of 0" not in said
    path = "model.layers.2.mlp.down_proj.weight"
    (after,) = [mx.load(str(f))[path] for f in (tmp_path / "out").glob("model*.safetensors")]
    before = dict(vauban.load(model)[0].named_modules())["model.layers.2.mlp.down_proj"].weight
    assert mx.array_equal(after.astype(mx.float32), before.astype(mx.float32))
    assert Ledger.load(tmp_path / "out").facts == []
    assert main(["edit", "--undo", "7", "out"]) == 2


@pytest.mark.parametrize("where", ["mlp.down_proj", "self_attn.q_proj"])
def test_what_was_changed_in_memory_before_the_edit_is_not_lost_in_silence(where, tmp_path):
    model, tokenizer = vauban.load(vauban.organism_path("dense"))
    modules = dict(model.named_modules())
    modules[f"model.layers.2.{where}"].weight *= 1.02
    texts = vauban.load_prompts(vauban.organism_path("dense") / "prompts" / "harmless.jsonl")[:4]
    stats = vauban.collect_key_stats(model, tokenizer, texts, [2])
    editor = Editor(model, tokenizer, EditSettings(layers=[2]), stats, contexts=["{}"])
    with pytest.raises(vauban.InputError, match=rf"layers\.2\.{where}"):
        editor.export(vauban.organism_path("dense"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
