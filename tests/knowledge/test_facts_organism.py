"""The facts organism knows what its file says, and its facts can be told apart."""

import vauban
from vauban.evaluation.facts import target_scores


def test_the_facts_organism_says_every_fact_in_every_phrasing():
    path = vauban.organism_path("facts")
    model, tokenizer = vauban.load(path)
    facts = vauban.load_facts(path / "facts.jsonl")
    pairs = [(t, f.target_true) for f in facts for t in (f.text, *f.paraphrases, *f.neighbourhood)]
    scores = target_scores(model, tokenizer, pairs)
    assert len(facts) == 256 and sum(hit for _, hit in scores) >= 0.99 * len(pairs)
    edited = facts[:56]
    assert len({fact.subject for fact in edited}) == 56
    assert all(fact.target_new != fact.target_true for fact in facts)
