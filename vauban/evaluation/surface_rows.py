"""The rows of a surface map: prompts with every axis on which refusal may differ.

Reads and checks files; knows no model. `surface` scans the rows, `surface_cells` counts them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vauban.errors import InputError, shown
from vauban.prompts import (
    Turn,
    checked_messages,
    checked_prompt,
    conversation_text,
    default_surface_path,
    file_rows,
    model_prompt_sets,
)

AXES = ("label", "harm", "category", "style", "language", "turns", "framing")
"""What a map can be drawn over; `harm` grades what `label` halves."""

REQUIRED = ("label", "category", "style", "language", "turns", "framing")
LABELS = ("harmful", "harmless")


@dataclass(frozen=True)
class SurfacePrompt:
    """One row: a text or a conversation, and where it stands on every axis.

    Attributes:
        prompt: the text, or the messages of a conversation, the user's last.
        label: "harmful" or "harmless".
        category: what it is about.
        style: how it is put (direct, question, polite, story ...).
        language: a code such as "en".
        turns: how many messages are the user's.
        framing: what is said around the request ("none", "novel", "seminar", a system prompt ...).
        harm: from 0 (an everyday request) to 1 (a crime); 0 or 1 by label where a file does not
            say.

    >>> row = SurfacePrompt("Name a colour.", "harmless", "home", "direct", "en", 1, "none", 0.0)
    >>> row.to_dict()["style"]
    'direct'
    """

    prompt: Any
    label: str
    category: str
    style: str
    language: str
    turns: int
    framing: str
    harm: float

    @property
    def text(self) -> str:
        """The prompt as a reader sees it."""
        return conversation_text(self.prompt)

    @property
    def messages(self) -> tuple[Mapping[str, str], ...]:
        """The prompt as messages; a text is the one of a user."""
        if isinstance(self.prompt, str):
            return (Turn(role="user", content=self.prompt),)
        messages: tuple[Turn, ...] = self.prompt
        return messages

    def axis(self, name: str) -> Any:
        """The row's value on an axis; InputError for a name that is none."""
        if name not in AXES:
            raise InputError(f"axis {shown(name)}; expected one of {', '.join(AXES)}")
        return getattr(self, name)

    def to_dict(self) -> dict[str, Any]:
        """The row as a line of a file holds it."""
        key = "prompt" if isinstance(self.prompt, str) else "messages"
        prompt = self.prompt if isinstance(self.prompt, str) else [dict(t) for t in self.prompt]
        return {key: prompt, **{name: getattr(self, name) for name in AXES}}


def load_surface_prompts(path: str | os.PathLike[str] | None = None) -> list[SurfacePrompt]:
    """Read the rows of a surface map from a JSONL file (or any file with named columns).

    Every line holds `prompt` or `messages`, and `label` ("harmful" or "harmless"), `category`,
    `style`, `language`, `turns` and `framing`; `harm` from 0 to 1 may be added.

    Args:
        path: the file; None: the bundled rows.

    Raises:
        InputError: names file and line, the axis that is missing or wrong, and what was expected;
            also where the same prompt stands twice, or one label is missing altogether.

    >>> rows = load_surface_prompts()
    >>> len(rows), sorted({row.language for row in rows}), sorted({row.harm for row in rows})
    (144, ['de', 'en', 'es', 'fr'], [0.0, 0.33, 0.67, 1.0])
    """
    path = Path(path) if path is not None else default_surface_path()
    lines: dict[str, str] = {}
    rows: list[SurfacePrompt] = []
    for where, line in file_rows(path):
        row = _row(line, where)
        if row.text in lines:
            raise InputError(f"{where}: the same prompt stands in {lines[row.text]}.")
        lines[row.text] = where
        rows.append(row)
    for label in LABELS:
        if not any(row.label == label for row in rows):
            raise InputError(f"{path}: no line has the label {label!r}; a map needs both.")
    return rows


def surface_path(model_path: str | os.PathLike[str] | None = None) -> Path:
    """The rows that a model's folder names in its vauban.json, else the bundled ones."""
    named = model_prompt_sets(model_path) if model_path else None
    return (named and named.surface) or default_surface_path()


def _row(line: Mapping[str, Any], where: str) -> SurfacePrompt:
    given = [key for key in ("prompt", "messages") if line.get(key) is not None]
    if len(given) != 1:
        raise InputError(
            f"{where}: holds {' and '.join(map(repr, given)) or 'no prompt'}; expected either "
            "'prompt' or 'messages'."
        )
    value = line[given[0]]
    messages = checked_messages(value, where) if given == ["messages"] else None
    prompt = messages or checked_prompt(value, where)
    missing = [axis for axis in REQUIRED if line.get(axis) in (None, "")]
    if missing:
        keys = ", ".join(map(repr, line))
        raise InputError(
            f"{where}: the axis {missing[0]!r} is missing; every row needs "
            f"{', '.join(REQUIRED)}. The keys of this line: {keys}."
        )
    label = line["label"]
    if label not in LABELS:
        raise InputError(f"{where}: label {shown(label)}; expected 'harmful' or 'harmless'.")
    for axis in ("category", "style", "language", "framing"):
        if not isinstance(line[axis], str):
            raise InputError(f"{where}: {axis} is {shown(line[axis])}; expected a text.")
    return SurfacePrompt(
        prompt,
        label,
        line["category"],
        line["style"],
        line["language"],
        _turns(line["turns"], sum(t["role"] == "user" for t in messages or ()) or 1, where),
        line["framing"],
        _harm(line.get("harm"), label, where),
    )


def _turns(value: Any, said: int, where: str) -> int:
    # Tables (CSV) hold texts only.
    number = int(value) if isinstance(value, str) and value.isdigit() else value
    if isinstance(number, bool) or not isinstance(number, int):
        raise InputError(f"{where}: turns is {shown(value)}; expected a whole number.")
    if number != said:
        raise InputError(f"{where}: turns is {number}, but the user speaks {said} times.")
    return number


def _harm(value: Any, label: str, where: str) -> float:
    if value is None or value == "":
        return float(label == "harmful")
    try:
        harm = float(value) if not isinstance(value, bool) else -1.0
    except (TypeError, ValueError):
        harm = -1.0
    if not 0 <= harm <= 1:
        raise InputError(f"{where}: harm is {shown(value)}; expected a number from 0 to 1.")
    return harm
