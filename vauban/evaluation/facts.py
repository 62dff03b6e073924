"""Whether a model states facts: by probability, by arg-max, and when it writes freely.

The CounterFact metrics (Meng et al. 2022), each also in its strict form, beside free generation and
a baseline that only has the fact in its context. Knows models and facts; edits nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban._arrays import as_numpy
from vauban._common import Progress
from vauban._results import to_plain
from vauban.errors import InputError
from vauban.evaluation.intervals import wilson_interval
from vauban.generation import Batches, decode, eos_ids, generate_tokens, token_budget
from vauban.knowledge import Fact, target_ids
from vauban.models import can_pad, check_same_vocabulary, forward

# Tokens of a free answer.
ANSWER_TOKENS = 24


@dataclass(frozen=True)
class Rate:
    """`hits` of `n`, with the rate and its 95 % Wilson interval; both None where n is 0."""

    hits: int
    n: int
    rate: float | None = None
    interval: tuple[float, float] | None = None

    @classmethod
    def of(cls, marks: Sequence[bool]) -> Rate:
        hits, n = sum(map(bool, marks)), len(marks)
        return cls(hits, n, hits / n if n else None, wilson_interval(hits, n) if n else None)

    def __str__(self) -> str:
        if self.rate is None or self.interval is None:
            return "-"
        low, high = self.interval
        return f"{self.rate:.1%} [{low:.1%}, {high:.1%}]"


@dataclass(frozen=True)
class FactScores:
    """One model on a set of facts.

    efficacy, paraphrase   -log p per token of the new target is below the true one's, on the prompt
                           and on its paraphrases; facts without a true target do not count
    neighbourhood          the true one is below the new one, on other subjects
    *_strict               every token of that target is the likeliest one
    exact, contained       a free answer begins with the new target, or holds it
    score                  harmonic mean of efficacy, paraphrase and neighbourhood, None without one
    fluency                entropy of the answers' word pairs and triples, in bits times 100
    """

    efficacy: Rate
    paraphrase: Rate
    neighbourhood: Rate
    efficacy_strict: Rate
    paraphrase_strict: Rate
    neighbourhood_strict: Rate
    exact: Rate
    contained: Rate
    score: float | None
    fluency: float | None


@dataclass(frozen=True)
class FactEval:
    """`original` and `modified`, and `in_context`: the original with each fact told before it.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> facts = [vauban.Fact("Where is the {} ?", "lamp", "river", "house")]
    >>> found = evaluate_facts(model, model, tokenizer, facts, generate=False)
    >>> found.facts, found.original == found.modified
    (1, True)
    """

    original: FactScores
    modified: FactScores
    in_context: FactScores
    facts: int
    answers: tuple[str, ...] = field(default=(), repr=False)

    def summary(self) -> str:
        lines = [f"{self.facts} facts (by probability; strict in brackets)"]
        for name in ("original", "in_context", "modified"):
            s: FactScores = getattr(self, name)
            parts = [
                f"{part} {getattr(s, part)} ({getattr(s, part + '_strict')})"
                for part in ("efficacy", "paraphrase", "neighbourhood")
            ]
            lines.append(f"{name}: {', '.join(parts)}, said freely {s.exact}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_plain(self)
        return plain


def evaluate_facts(
    original: nn.Module,
    modified: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    *,
    generate: bool = True,
    max_tokens: int = ANSWER_TOKENS,
    progress: Progress | None = None,
) -> FactEval:
    """What two models say of the facts.

    `generate` also lets them go on freely (greedy, `max_tokens` at most, stopped at an end token),
    because teacher forcing flatters edits: published rates fall from 97 to 38 % there (arXiv
    2502.11177).

    Raises InputError for no facts and for models of different vocabularies.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> facts = [vauban.Fact("Where is the {} ?", "lamp", "river", "house")]
    >>> evaluate_facts(model, model, tokenizer, facts, generate=False).original.efficacy.n
    1
    """
    if not facts:
        raise InputError("no facts to evaluate; expected at least one")
    check_same_vocabulary(original, modified, "evaluate_facts")
    limit = max_tokens if generate else 0
    before, _ = score_facts(original, tokenizer, facts, limit, progress=progress)
    after, answers = score_facts(modified, tokenizer, facts, limit, progress=progress)
    told, _ = score_facts(original, tokenizer, facts, limit, told=True, progress=progress)
    return FactEval(before, after, told, len(facts), tuple(answers))


def score_facts(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    max_tokens: int = ANSWER_TOKENS,
    told: bool = False,
    progress: Progress | None = None,
) -> tuple[FactScores, list[str]]:
    """One model's scores and free answers (none with `max_tokens` 0).

    `told` puts each fact before its prompts.
    """
    heads = [f"{f.text} {f.target_new.strip()}.\n" if told else "" for f in facts]
    asked: list[tuple[str, int, str]] = []
    for number, fact in enumerate(facts):
        asked.append(("efficacy", number, heads[number] + fact.text))
        asked += [("paraphrase", number, heads[number] + text) for text in fact.paraphrases]
        asked += [("neighbourhood", number, heads[number] + text) for text in fact.neighbourhood]
    pairs = []
    for _, number, text in asked:
        fact = facts[number]
        pairs += [(text, target) for target in (fact.target_new, fact.target_true) if target]
    scored = iter(target_scores(model, tokenizer, pairs))
    marks: dict[str, list[bool]] = {}
    for name, number, _ in asked:
        fact, new = facts[number], next(scored)
        true = next(scored) if fact.target_true else None
        other = name == "neighbourhood"
        if true is not None:
            wins = true[0] < new[0] if other else new[0] < true[0]
            marks.setdefault(name, []).append(wins)
        strict = true if other else new
        if strict is not None:
            marks.setdefault(f"{name}_strict", []).append(strict[1])
    rates = {
        f"{name}{form}": Rate.of(marks.get(f"{name}{form}", []))
        for name in ("efficacy", "paraphrase", "neighbourhood")
        for form in ("", "_strict")
    }
    three = [rates[name].rate for name in ("efficacy", "paraphrase", "neighbourhood")]
    known = [rate for rate in three if rate is not None]
    score = None
    if len(known) == 3:
        score = 3.0 / sum(1.0 / rate for rate in known) if all(known) else 0.0
    answers = []
    if max_tokens:
        prompts = [
            [int(i) for i in tokenizer.encode(head + fact.text)]
            for head, fact in zip(heads, facts, strict=True)
        ]
        ends = generate_tokens(model, prompts, eos=eos_ids(tokenizer), max_tokens=max_tokens,
                               progress=progress)  # fmt: skip
        answers = [decode(tokenizer, end) for end in ends]
    said = [_said(a, f.target_new) for a, f in zip(answers, facts, strict=False)]
    fluency = float(np.mean([100 * entropy(a) for a in answers])) if answers else None
    return FactScores(
        **rates,
        exact=Rate.of([exact for exact, _ in said]),
        contained=Rate.of([held for _, held in said]),
        score=score,
        fluency=fluency,
    ), answers


def target_scores(
    model: nn.Module, tokenizer: Any, pairs: Sequence[tuple[str, str]]
) -> list[tuple[float, bool]]:
    """For each (prompt, target) the mean -log p of the target's tokens, and whether all of them are
    the likeliest ones."""
    starts = [[int(i) for i in tokenizer.encode(text)] for text, _ in pairs]
    targets = [target_ids(tokenizer, text, target) for text, target in pairs]
    rows = [[*start, *target[:-1]] for start, target in zip(starts, targets, strict=True)]
    scores: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    for batch in Batches(rows, budget=token_budget(model), equal_lengths=not can_pad(model)):
        most = max(len(targets[row]) for row in batch.rows)
        columns = [
            [min(len(starts[row]) - 1 + i, len(rows[row]) - 1) for i in range(most)]
            for row in batch.rows
        ]
        out = forward(model, batch.tokens, positions=None, logits=mx.array(columns))
        assert out.logits is not None
        logits = out.logits.astype(mx.float32)
        logs = as_numpy(logits - mx.logsumexp(logits, -1, keepdims=True))
        for place, row in enumerate(batch.rows):
            ids = targets[row]
            steps = logs[place, : len(ids)]
            nll = -float(np.mean(steps[np.arange(len(ids)), list(ids)]))
            scores[row] = nll, bool((steps.argmax(-1) == list(ids)).all())
    return scores


def entropy(text: str) -> float:
    """½ (⅔ H₂ + 4/3 H₃) bits, H_n the entropy of the text's word n-grams; 0 without any.

    >>> entropy("a a a a a")
    0.0
    """
    words = text.lower().split()

    def bits(n: int) -> float:
        counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        share = np.array(list(counts.values()), float) / max(sum(counts.values()), 1)
        return float(-(share * np.log2(share)).sum()) + 0.0 if len(share) else 0.0

    return (2 / 3 * bits(2) + 4 / 3 * bits(3)) / 2


def _said(answer: str, target: str) -> tuple[bool, bool]:
    """Whether an answer begins with the target as whole words, and whether it holds it."""
    words = [_bare(word) for word in answer.split()]
    wanted = [_bare(word) for word in target.split()]
    spans = [words[i : i + len(wanted)] == wanted for i in range(len(words))]
    return bool(spans and spans[0]), any(spans)


def _bare(word: str) -> str:
    return word.strip(".,;:!?\"'()").casefold()
