"""Facts, and the files that hold them. Knows text and JSON; knows no tokenizer and no model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vauban.errors import InputError, shown


@dataclass(frozen=True)
class Fact:
    """One statement a model is to make: `prompt` with one `{}` for `subject`, then `target_new`.

    `target_true` is what the model says otherwise. `paraphrases` and `neighbourhood` are whole
    prompts: the first should now give the new target as well, the second (about other subjects)
    should not.

    Raises InputError for a template without or with two `{}`, and for an empty text.

    >>> Fact("The mother tongue of {} is", "Danielle Darrieux", "English").text
    'The mother tongue of Danielle Darrieux is'
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbourhood: tuple[str, ...] = ()
    id: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target_new"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise InputError(f"{name} is {shown(value)}; expected a text that is not empty")
        if self.prompt.count("{}") != 1:
            raise InputError(
                f"prompt {shown(self.prompt)} holds {self.prompt.count('{}')} times {{}}; expected "
                "one, in the subject's place"
            )
        for name in ("paraphrases", "neighbourhood"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(v, str) and v.strip() for v in value):
                raise InputError(f"{name} is {shown(value)}; expected a list of prompts")
            object.__setattr__(self, name, tuple(value))

    @property
    def text(self) -> str:
        """The prompt with the subject in it."""
        return self.prompt.replace("{}", self.subject)

    def to_dict(self) -> dict[str, Any]:
        """As `load_facts` reads it."""
        return {
            "id": self.id,
            "prompt": self.prompt,
            "subject": self.subject,
            "target_new": self.target_new,
            "target_true": self.target_true,
            "paraphrases": list(self.paraphrases),
            "neighbourhood": list(self.neighbourhood),
        }


def load_facts(path: str | Path) -> list[Fact]:
    """The facts of a file, a JSON list or one JSON object a line.

    Read are the vauban keys (those of `Fact`), CounterFact's `requested_rewrite`, EasyEdit's flat
    `prompt`/`subject`/`target_new` with `paraphrase_prompts` and `neighborhood_prompts`, and
    zsRE-MEND's `src`/`alt`/`answers`/`rephrase`. A prompt that names its subject instead of `{}`
    gets it. A fact without an id is numbered by its line.

    Raises InputError naming file, line, what was expected and what was given.

    >>> import vauban
    >>> fact = load_facts(vauban.organism_path("facts") / "facts.jsonl")[0]
    >>> "{}" in fact.prompt, fact.subject in fact.text
    (True, True)
    """
    path = Path(path).expanduser()
    facts = []
    for where, number, row in _rows(path):
        try:
            fact = _fact(row)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        facts.append(fact if fact.id is not None else replace(fact, id=str(number)))
    seen: dict[str | None, str] = {}
    for fact in facts:
        if fact.id in seen:
            raise InputError(f"{path}: id {fact.id!r} stands twice; expected one fact an id")
        seen[fact.id] = fact.prompt
    return facts


def check_batch(facts: Sequence[Fact]) -> None:
    """InputError for facts that contradict one another: one prompt with two targets."""
    targets: dict[str, str] = {}
    for fact in facts:
        before = targets.setdefault(fact.text, fact.target_new.strip())
        if before != fact.target_new.strip():
            raise InputError(
                f"{shown(fact.text)} is to be {before!r} and {fact.target_new!r}; expected one "
                "target a prompt"
            )


def _rows(path: Path) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected facts as JSON or JSONL")
    text = path.read_text(encoding="utf-8")
    listed = text.lstrip().startswith("[")
    if listed:
        try:
            rows = [(f"{path}, fact {i}", i, row) for i, row in enumerate(json.loads(text), 1)]
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {error.lineno}: broken JSON, {error.msg}") from error
    else:
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                rows.append((f"{path}, line {number}", number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: broken JSON, {error.msg}") from error
    if not rows:
        raise InputError(f"{path}: no facts; expected at least one")
    for where, number, row in rows:
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: expected a JSON object, given {shown(row)}")
        yield where, number, row


def _fact(row: Mapping[str, Any]) -> Fact:
    prompt: Any
    subject: Any
    rewrite = row.get("requested_rewrite", row)
    if not isinstance(rewrite, Mapping):
        raise InputError(f"requested_rewrite is {shown(rewrite)}; expected an object")
    prompt, target = rewrite.get("prompt", row.get("src")), rewrite.get("target_new")
    target = row.get("alt") if target is None else target
    subject = rewrite.get("subject")
    missing = {"prompt": prompt, "subject": subject, "target_new": target}
    for name, value in missing.items():
        if value is None:
            raise InputError(f"the key {name!r} is missing; given are {', '.join(row) or 'none'}")
    if isinstance(prompt, str) and "{}" not in prompt and isinstance(subject, str):
        if prompt.count(subject) != 1:
            raise InputError(
                f"subject {shown(subject)} stands {prompt.count(subject)} times in prompt "
                f"{shown(prompt)}; expected {{}} or the subject, once"
            )
        prompt = prompt.replace(subject, "{}")
    answers = row.get("answers") or [None]
    true = rewrite.get("target_true", rewrite.get("ground_truth", answers[0]))
    number = row.get("id", row.get("case_id"))
    return Fact(
        prompt,
        subject,
        _text(target),
        None if true is None else _text(true),
        _prompts(row, "paraphrases", "paraphrase_prompts", "rephrase", "rephrase_prompt"),
        _prompts(row, "neighbourhood", "neighborhood_prompts", "neighborhood"),
        None if number is None else str(number),
    )


def _text(value: Any) -> Any:
    """A target as text: CounterFact keeps it in {"str": ..., "id": ...}."""
    return value.get("str") if isinstance(value, Mapping) else value


def _prompts(row: Mapping[str, Any], *names: str) -> Any:
    for name in names:
        if name in row:
            return (row[name],) if isinstance(row[name], str) else tuple(row[name])
    return ()
