"""What a model says of a subject in its own words, and that an edit leaves it alone."""

import mlx.core as mx
import numpy as np
import pytest

import vauban
from tests.knowledge.test_editor import CONTEXTS, made, published_value, settings
from vauban.errors import InputError
from vauban.evaluation.facts import target_scores
from vauban.knowledge import (
    Editor,
    EditSettings,
    Fact,
    ValueSettings,
    collect_key_stats,
    optimise_values,
)
from vauban.knowledge.tasks import own_words, value_tasks


@pytest.fixture(scope="module")
def people():
    path = vauban.organism_path("facts")
    model, tokenizer = vauban.load(path)
    return model, tokenizer, vauban.load_facts(path / "facts.jsonl")


def test_each_way_to_go_on_begins_with_a_likely_token_and_follows_the_arg_max(people):
    model, tokenizer, facts = people
    fact = facts[0]
    rows = own_words(model, tokenizer, [fact], 60)[fact.subject]
    head = rows[0].tokens[: rows[0].pivot + 1]
    assert tokenizer.decode(list(head)).strip() == fact.subject
    order = np.argsort(-np.array(model(mx.array([list(head)]))[0, -1]), kind="stable")
    begun = [row.tokens[len(head)] for row in rows]
    known = [int(token) for token in order if int(token) in set(begun)]
    assert begun == known and len(begun) > 30
    for row in rows[:6]:
        logits = np.array(model(mx.array([list(row.tokens)]))[0])
        followed = logits.argmax(-1)[len(head) : -1]
        assert len(row.tokens) <= len(head) + 5
        assert np.array_equal(followed, row.tokens[len(head) + 1 :])


def test_what_is_to_change_is_not_kept_and_the_rest_is(people):
    model, tokenizer, facts = people
    fact = facts[0]
    others = {f.target_true for f in facts if f.subject == fact.subject and f is not fact}
    texts = [tokenizer.decode(list(row.tokens))
             for row in own_words(model, tokenizer, [fact], 12)[fact.subject]]  # fmt: skip
    assert len(texts) >= 6 and not any(str(fact.target_true) in text for text in texts)
    assert sum(any(word in text for text in texts) for word in others) >= 2
    # Of a subject with two facts neither is kept; the order and other subjects change nothing.
    second = next(f for f in facts if f.subject == fact.subject and f is not fact)
    pair = own_words(model, tokenizer, [second, facts[1], fact], 12)
    both = [tokenizer.decode(list(row.tokens)) for row in pair[fact.subject]]
    wanted = [text for text in texts if str(second.target_true) not in text]
    assert both == wanted and len(both) < len(texts)


@pytest.mark.parametrize("keep", [1, 4])
def test_values_are_those_of_the_published_form_with_more_rows_that_stay(keep, organism):
    tokenizer = organism[1]
    model = made(int(organism[0].model.embed_tokens.weight.shape[0]))
    s = settings(kl_factor=0.5)
    for fact in (Fact("The {} is in the", "old lamp", "river"), Fact("A {} is a", "rope", "boat")):
        tasks = value_tasks(model, tokenizer, [fact], CONTEXTS, keep)
        assert len(tasks[0].kept) > 1
        chosen = ValueSettings(s.steps, s.lr, s.weight_decay, s.kl_factor, s.clamp)
        value = optimise_values(model, 2, tasks, chosen)[0]
        by_hand = published_value(model, tokenizer, fact, s, 2, tasks[0].kept[1:])
        assert np.abs(value.z - by_hand).max() <= 1e-4
        free = optimise_values(model, 2, value_tasks(model, tokenizer, [fact], CONTEXTS, 0), chosen)
        assert np.abs(value.z - free[0].z).max() > 1e-2


def test_what_else_is_known_of_a_subject_stays_with_its_own_words_kept(people):
    _, tokenizer, facts = people
    edited = facts[:8]
    subjects = {fact.subject for fact in edited}
    others = [(text, f.target_true) for f in facts[8:] if f.subject in subjects
              for text in (f.text, *f.paraphrases)]  # fmt: skip
    stayed, hit = {}, {}
    for keep in (0, 8):
        model, _ = vauban.load(vauban.organism_path("facts"))
        texts = [f"{f.text} {f.target_true} ." for f in facts]
        stats = collect_key_stats(model, tokenizer, texts, (1, 2))
        editor = Editor(model, tokenizer, EditSettings(layers=(1, 2), keep=keep), stats)
        editor.edit(edited)
        stayed[keep] = np.mean([s[1] for s in target_scores(model, tokenizer, others)])
        new = [(f.text, f.target_new) for f in edited]
        hit[keep] = np.mean([s[1] for s in target_scores(model, tokenizer, new)])
    assert hit[8] == 1.0 and stayed[8] >= 0.9 > stayed[0] + 0.15


def test_a_number_of_ways_that_cannot_be():
    for keep in (-1, 2.5, "many"):
        with pytest.raises(InputError, match=r"keep is .*; expected a whole number, 0 or more"):
            EditSettings(keep=keep)
