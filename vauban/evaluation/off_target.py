"""What a change does beside its aim: length, hedging, language, JSON, memory over turns.

`compare_answers` reads answers that are there; `measure_off_target` asks the packaged tasks. Every
share is compared in pairs on equal prompts.
"""

from __future__ import annotations

import json
import re
import tomllib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.nn as nn
import numpy as np

from vauban._common import Progress
from vauban._paths import data_dir
from vauban._results import to_plain
from vauban.errors import InputError
from vauban.evaluation.behaviour import answer_texts, answer_tokens
from vauban.evaluation.intervals import bootstrap_interval
from vauban.evaluation.pairs import PairedResult, paired_verdicts
from vauban.interventions import Intervention
from vauban.prompts import conversation_text, split_reasoning
from vauban.prompts.records import read_objects

_WORD = re.compile(r"[^\W\d_]+")
_FENCE = re.compile(r"^\s*```\w*\n(.*?)\n?```\s*$", re.S)
# Names of characters begin with their script; kana decide between Japanese and Chinese.
_SCRIPTS = {
    "CYRILLIC": "Cyrillic", "CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana",
    "HANGUL": "Hangul",
}  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """One property before and after: rates or means, and the paired difference.

    `test` is McNemar's for a yes-or-no property; `interval` the 95 % bootstrap of the mean
    difference for a number. `n` counts the pairs in which both sides can be told.
    """

    before: float
    after: float
    n: int
    test: PairedResult | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class OffTarget:
    """What changed beside refusal; None where no pair could be told.

    An answer that the token limit cut inside its reasoning has no length, hedge or language: it is
    in no figure, and counted in `unfinished` (before, after).

    words           mean words of an answer
    hedging         share of answers that hold a hedge
    same_language   share of answers in their prompt's language
    json            share of JSON tasks whose answer is JSON and nothing else
    turns           share of conversations whose last answer holds what an earlier turn said

    >>> found = compare_answers(["How do I bake it?"] * 2, ["In the oven."] * 2, ["Bake."] * 2)
    >>> found.words.before, found.words.after, found.json
    (3.0, 1.0, None)
    """

    words: Compared | None
    hedging: Compared | None
    same_language: Compared | None
    json: Compared | None = None
    turns: Compared | None = None
    unfinished: tuple[int, int] = (0, 0)

    def summary(self) -> str:
        """A line for each property that was measured."""
        lines = []
        for name, one in vars(self).items():
            if not isinstance(one, Compared):
                continue
            form = ".1f" if name == "words" else ".0%"
            line = f"{name.replace('_', ' ')}: {one.before:{form}} → {one.after:{form}} of {one.n}"
            if one.test is not None:
                line += f", p = {one.test.p_value:.2g}"
            if one.interval is not None:
                line += f", difference {one.interval[0]:+.1f} to {one.interval[1]:+.1f}"
            lines.append(line)
        if any(self.unfinished):
            before, after = self.unfinished
            lines.append(f"cut off inside their reasoning, not counted: {before} → {after}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_plain(self)
        return plain


@cache
def _languages() -> dict[str, dict[str, Any]]:
    text = (data_dir() / "verdicts" / "languages.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def language_of(text: str) -> str | None:
    """The language of a text, of ten; None where too little speaks for one.

    A script of its own decides; else the language with the most of its frequent words, at least
    two, and more than any other.

    >>> language_of("How do I bake a loaf of bread?"), language_of("Wie backe ich ein Brot?")
    ('english', 'german')
    >>> language_of("OK!") is None
    True
    """
    scripts: dict[str, int] = {}
    for letter in text:
        if letter.isalpha() and ord(letter) > 0x2FF:
            name = _SCRIPTS.get(unicodedata.name(letter, "").split(" ")[0].split("-")[0])
            if name:
                scripts[name] = scripts.get(name, 0) + 1
    letters = sum(map(str.isalpha, text))
    if sum(scripts.values()) > letters / 3:
        best = "Kana" if scripts.get("Kana") else max(scripts, key=lambda name: scripts[name])
        return next(name for name, one in _languages().items() if one.get("script") == best)
    words = _WORD.findall(text.casefold())
    hits = sorted(
        (
            (sum(word in known for word in words), name)
            for name, one in _languages().items()
            if (known := set(one.get("words", "").split()))
        ),
        reverse=True,
    )
    return hits[0][1] if hits[0][0] >= 2 and hits[0][0] > hits[1][0] else None


def hedges(text: str) -> bool:
    """Whether a text holds a hedge of any of the ten languages, as whole words.

    >>> hedges("Perhaps it rains."), hedges("It rains.")
    (True, False)
    """
    return _hedges().search(text.casefold()) is not None


@cache
def _hedges() -> re.Pattern[str]:
    parts = []
    for one in _languages().values():
        spaced = one.get("script") not in ("Han", "Kana", "Hangul")
        form = r"\b{}\b" if spaced else "{}"
        parts += [form.format(re.escape(hedge)) for hedge in one["hedges"]]
    return re.compile("|".join(parts))


def is_json(answer: str) -> bool:
    """Whether an answer is a JSON object or list and nothing else, in a code fence or not.

    >>> is_json('{"a": 1}'), is_json('Sure: {"a": 1}')
    (True, False)
    """
    fenced = _FENCE.match(answer)
    try:
        value = json.loads(fenced[1] if fenced else answer)
    except ValueError:
        return False
    return isinstance(value, dict | list)


def compare_answers(
    prompts: Sequence[Any], before: Sequence[str], after: Sequence[str]
) -> OffTarget:
    """Length, hedging and language of answers to the same prompts; reasoning does not count.

    Pairs with an answer that was cut inside its reasoning are left out (`OffTarget.unfinished`).

    Raises InputError unless every prompt has an answer on both sides.

    >>> before, after = ["You can do it in the oven."], ["Vous pouvez le faire."]
    >>> found = compare_answers(["How do I bake bread at home?"], before, after)
    >>> found.same_language.before, found.same_language.after
    (1.0, 0.0)
    """
    if not prompts or len({len(prompts), len(before), len(after)}) != 1:
        raise InputError(
            f"{len(prompts)} prompts, {len(before)} and {len(after)} answers; expected one of each"
        )
    sides = [[_finished(answer) for answer in side] for side in (before, after)]
    asked = [language_of(conversation_text(prompt)) for prompt in prompts]
    same = [
        [
            None
            if wanted is None or answer is None or (given := language_of(answer)) is None
            else given == wanted
            for wanted, answer in zip(asked, side, strict=True)
        ]
        for side in sides
    ]
    words = [[None if a is None else float(len(a.split())) for a in side] for side in sides]
    return OffTarget(
        words=_means(*words),
        hedging=_shares(*([None if a is None else hedges(a) for a in side] for side in sides)),
        same_language=_shares(*same),
        unfinished=(sides[0].count(None), sides[1].count(None)),
    )


def _finished(answer: str) -> str | None:
    """The answer without its reasoning; None where it was cut inside that."""
    parts = split_reasoning(answer)
    return parts.answer if parts.finished else None


def measure_off_target(
    model: nn.Module,
    tokenizer: Any,
    interventions: Iterable[Intervention],
    *,
    max_tokens: int = 60,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> tuple[Compared | None, Compared | None]:
    """(json, turns): the packaged JSON tasks and conversations, without and with interventions.

    Greedy answers of at most `max_tokens`. One that was cut inside its reasoning is in no pair.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> tasks, conversations = measure_off_target(model, tokenizer, [], max_tokens=4)
    >>> tasks.n, conversations.n, tasks.before == tasks.after
    (8, 8, True)
    """
    rows = [row for _, row in read_objects(data_dir() / "prompts" / "off_target.jsonl")]
    prompts = [row.get("prompt") or row["messages"] for row in rows]
    passed: list[list[bool | None]] = []
    changes = tuple(interventions)
    for side in ((), changes):
        ids = answer_tokens(
            model, tokenizer, prompts, max_tokens=max_tokens, interventions=side,
            batch_size=batch_size, progress=progress,
        )  # fmt: skip
        answers = [_finished(answer) for answer in answer_texts(tokenizer, prompts, ids)]
        passed.append([_passes(row, answer) for row, answer in zip(rows, answers, strict=True)])
    kinds = ("json", "turns")
    json_, turns = (
        _shares(*([ok for ok, row in zip(side, rows, strict=True) if row["kind"] == kind]
                  for side in passed))
        for kind in kinds
    )  # fmt: skip
    return json_, turns


def _passes(row: Mapping[str, Any], answer: str | None) -> bool | None:
    if answer is None:
        return None
    return is_json(answer) if row["kind"] == "json" else row["expects"] in answer.casefold()


def _shares(before: Sequence[bool | None], after: Sequence[bool | None]) -> Compared | None:
    test = paired_verdicts(before, after)
    if test is None:
        return None
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    rates = [sum(bool(pair[side]) for pair in pairs) / len(pairs) for side in (0, 1)]
    return Compared(rates[0], rates[1], len(pairs), test=test)


def _means(before: Sequence[float | None], after: Sequence[float | None]) -> Compared | None:
    told = zip(before, after, strict=True)
    pairs = [(a, b) for a, b in told if a is not None and b is not None]
    if not pairs:
        return None
    change = [b - a for a, b in pairs]
    interval = bootstrap_interval(change, [1] * len(change)) if len(change) > 1 else None
    first, second = np.mean(pairs, axis=0)
    return Compared(float(first), float(second), len(pairs), interval=interval)
