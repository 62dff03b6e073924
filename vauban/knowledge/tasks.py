"""What the training of values is given: a fact in all its contexts, and what is to stay.

A value stands for the whole subject, though it is trained for one prompt. So that it changes
nothing else about the subject, what the model says of it in other words is kept: beside "{subject}
is a" (Meng et al. 2023, section 4.2) continuations of the subject by the model itself, in the
spirit of learning without forgetting (Li and Hoiem 2016, 1606.09282). Knows models and tokenizers;
trains nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban._arrays import as_numpy
from vauban.generation import Batches, eos_ids, generate_tokens, token_budget
from vauban.knowledge.facts import Fact
from vauban.knowledge.tokens import Row, encode_fact, target_ids
from vauban.knowledge.values import ValueTask
from vauban.models import can_pad, forward

# Length of a continuation in tokens; the last one is kept and nothing behind it: what follows a
# finished sentence says nothing of the subject, and keeping it cost the facts organism 7 points of
# efficacy.
_TOKENS = 6


def value_tasks(
    model: nn.Module, tokenizer: Any, facts: Sequence[Fact], contexts: Sequence[str], keep: int
) -> list[ValueTask]:
    """One task a fact; facts about one subject share a group. `keep` continuations at most stay."""
    subjects = list(dict.fromkeys(fact.subject for fact in facts))
    words = own_words(model, tokenizer, facts, keep) if keep else {}
    return [
        ValueTask(
            tuple(encode_fact(tokenizer, fact, context) for context in contexts),
            target_ids(tokenizer, fact.text, fact.target_new),
            (kl_row(tokenizer, fact), *words.get(fact.subject, ())),
            subjects.index(fact.subject),
        )
        for fact in facts
    ]


def kl_row(tokenizer: Any, fact: Fact) -> Row:
    """ "{subject} is a" up to the subject's end, whose next token is to stay as likely (MEMIT)."""
    row = encode_fact(tokenizer, Fact("{} is a", fact.subject, fact.target_new))
    return Row(row.tokens[: row.pivot + 1], row.pivot)


def own_words(
    model: nn.Module, tokenizer: Any, facts: Sequence[Fact], count: int
) -> dict[str, tuple[Row, ...]]:
    """By subject, how the model goes on after it: from each of the `count` likeliest tokens, then
    greedily. Nothing is drawn, so a subject's rows depend on the model and its own facts alone.

    Left out is what says the answer that is to change: continuations that hold the tokens which the
    model puts in the target's place now.
    """
    subjects = list(dict.fromkeys(fact.subject for fact in facts))
    heads = [encode_fact(tokenizer, Fact("{}", subject, "-")) for subject in subjects]
    starts = [list(row.tokens[: row.pivot + 1]) for row in heads]
    ends = eos_ids(tokenizer)
    first = _likeliest(model, starts, count, ends)
    begun = [[*start, token] for start, some in zip(starts, first, strict=True) for token in some]
    owner = [n for n, some in enumerate(first) for _ in some]
    rest = generate_tokens(model, begun, eos=ends, max_tokens=_TOKENS - 1)
    asked = [list(encode_fact(tokenizer, fact).tokens) for fact in facts]
    sizes = [len(target_ids(tokenizer, fact.text, fact.target_new)) for fact in facts]
    answers = generate_tokens(model, asked, eos=frozenset(), max_tokens=max(sizes))
    said: dict[str, list[list[int]]] = {subject: [] for subject in subjects}
    for fact, size, answer in zip(facts, sizes, answers, strict=True):
        said[fact.subject].append(list(answer[:size]))
    kept: dict[str, list[Row]] = {subject: [] for subject in subjects}
    for n, start, more in zip(owner, begun, rest, strict=True):
        pivot, spoken = heads[n].pivot, [start[-1], *more]
        if more and not any(_holds(spoken, answer) for answer in said[subjects[n]]):
            kept[subjects[n]].append(Row((*starts[n], *spoken[:-1]), pivot))
    return {subject: tuple(rows) for subject, rows in kept.items()}


def _holds(tokens: Sequence[int], part: Sequence[int]) -> bool:
    size = len(part)
    return any(list(tokens[i : i + size]) == list(part) for i in range(len(tokens) - size + 1))


def _likeliest(
    model: nn.Module, rows: Sequence[list[int]], count: int, ends: Iterable[int]
) -> list[list[int]]:
    """The `count` likeliest next tokens of each row, but for end tokens."""
    found: dict[int, list[int]] = {}
    for batch in Batches(rows, budget=token_budget(model), equal_lengths=not can_pad(model)):
        out = forward(model, batch.tokens, lengths=batch.lengths, positions=None, logits="last")
        assert out.logits is not None
        scores = as_numpy(out.logits.astype(mx.float32)).reshape(len(batch.rows), -1)
        scores[:, list(ends)] = -np.inf
        for row, order in zip(batch.rows, np.argsort(-scores, 1, kind="stable"), strict=True):
            found[row] = [int(token) for token in order[:count]]
    return [found[n] for n in range(len(rows))]
