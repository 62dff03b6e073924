"""Text sets for perplexity: raw texts and answered requests from files, the Hub, the bundled sets.

An entry is a text or a chat that ends with the assistant's answer. Knows files and rows; knows
nothing of tokenizers or models.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vauban._paths import data_dir
from vauban.errors import InputError
from vauban.prompts.chat import Message
from vauban.prompts.records import file_rows, has_rows
from vauban.prompts.sets import LabelledPrompt, load_prompts
from vauban.prompts.sources import HUB_PREFIX, DatasetRef, split_reference, split_table

Entry = str | list[Message]
"""A raw text, or a conversation whose last message is the assistant's."""

ANSWER_KEYS = ("completion", "response", "answer", "output")
"""The keys under which a row beside `prompt` may hold its answer."""

PILE = "hf:monology/pile-uncopyrighted?column=text&limit=2048"
"""General language modelling, as in Arditi et al. 2024 (read as a stream: the set is large)."""

ALPACA = (
    "hf:tatsu-lab/alpaca?prompt=instruction&completion=output&empty=input&shuffle=42&limit=2048"
)
"""Instruction following, as in Arditi et al. 2024: rows with an empty input, shuffled by 42."""

BUNDLED_TEXTS = ("plain", "chat", "facts")
"""The names of the sets that are shipped."""

_CHAT_KEYS = ("prompt", "completion", "empty", "shuffle")


def default_texts_path(kind: str) -> Path:
    """The bundled neutral texts: "plain" (paragraphs), "chat" (answered requests), or "facts"
    (statements about people, places and products, then the paragraphs)."""
    if kind not in BUNDLED_TEXTS:
        raise InputError(
            f"bundled texts: there is no set {kind!r}; expected 'plain', 'chat' or 'facts'."
        )
    return data_dir() / "texts" / f"{kind}.jsonl"


def load_texts(
    source: str | os.PathLike[str] | Mapping[str, Any] | DatasetRef | Sequence[Entry],
    *,
    limit: int | None = None,
    base_dir: str | os.PathLike[str] | None = None,
) -> list[Entry]:
    """Texts and chats from any way of naming them.

    Args:
        source: "plain", "chat" or "facts", the bundled sets; a JSONL file whose rows hold `text`,
            or `prompt` and one of `completion`, `response`, `answer`, `output`; a plain text file
            with one text per line; "hf:org/name?column=text"; for chats
            "hf:org/name?prompt=instruction&completion=output", where `empty=input` keeps the
            rows without an input and `shuffle=42` shuffles them by a seed (see `PILE`, `ALPACA`);
            the same as a table {hf = "org/name", ...}; or the entries themselves.
        limit: keep this many from the start.
        base_dir: the folder that relative paths start from.

    Raises:
        InputError: what was given, what was expected; files with the line.

    >>> texts, chats = load_texts("plain"), load_texts("chat", limit=2)
    >>> isinstance(texts[0], str), [turn["role"] for turn in chats[0]], len(chats)
    (True, ['user', 'assistant'], 2)
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; expected at least 1, or None for all.")
    entries = _entries(source, limit, base_dir)
    return entries[:limit]


def answer_chats(rows: Iterable[LabelledPrompt]) -> list[list[Message]]:
    """Prompt and `answer` of the rows that have one, as chats: a model organism's own world.

    >>> row = LabelledPrompt("Name a colour.", "harmless", {"answer": "red."})
    >>> answer_chats([row, LabelledPrompt("Name a tree.", "harmless")])[0][1]["content"]
    'red.'
    """
    return [chat(row.prompt, row["answer"]) for row in rows if row.get("answer")]


def chat(prompt: str, answer: str) -> list[Message]:
    """One request and its answer as messages."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _entries(source: Any, limit: int | None, base_dir: Any) -> list[Entry]:
    if isinstance(source, DatasetRef):
        return _hub_texts(source, limit)
    if isinstance(source, Mapping):
        repo_id, options = split_table(source)
        return _hub(repo_id, options, f"{dict(source)!r}", limit)
    if isinstance(source, str) and source.startswith(HUB_PREFIX):
        repo_id, options = split_reference(source)
        return _hub(repo_id, options, source, limit)
    if isinstance(source, str) and source in BUNDLED_TEXTS:
        return _file(default_texts_path(source))
    if isinstance(source, str | os.PathLike):
        return _file(Path(base_dir or ".") / source)
    if isinstance(source, Sequence) and source:
        return list(source)
    raise InputError(
        f"texts cannot be read from {type(source).__name__}; give a path, 'plain', 'chat', "
        "'facts', 'hf:org/name', a table with the key 'hf', or a list of texts and chats that is "
        "not empty."
    )


def _file(path: Path) -> list[Entry]:
    if not has_rows(path):
        return list(load_prompts(path))
    return [_row(row, where) for where, row in file_rows(path)]


def _row(row: Mapping[str, Any], where: str) -> Entry:
    if "text" in row:
        return _filled(row, "text", where)
    answers = [key for key in ANSWER_KEYS if key in row]
    if "prompt" not in row or len(answers) != 1:
        raise InputError(
            f"{where}: expected the key 'text', or 'prompt' and one of {', '.join(ANSWER_KEYS)}; "
            f"the keys of this line: {', '.join(row) or 'none'}."
        )
    return chat(_filled(row, "prompt", where), _filled(row, answers[0], where))


def _hub(repo_id: str, options: dict[str, Any], given: str, limit: int | None) -> list[Entry]:
    special = {key: options.pop(key) for key in _CHAT_KEYS if key in options}
    if not special:
        return _hub_texts(DatasetRef.from_options(repo_id, options, given), limit)
    if not {"prompt", "completion"} <= special.keys() or "column" in options:
        raise InputError(
            f"{given}: a chat set names the columns prompt=... and completion=..., a text set "
            "column=..."
        )
    reference = DatasetRef.from_options(repo_id, options, given)
    return _hub_chats(reference, special, given, limit)


def _hub_texts(reference: DatasetRef, limit: int | None) -> list[Entry]:
    column = reference.column

    def text(row: Mapping[str, Any], where: str) -> Entry | None:
        return _filled(row, column, where) if row[column] else None

    return _kept(reference, [column], text, limit, None, f"column {column!r} holds no texts")


def _hub_chats(
    reference: DatasetRef, columns: Mapping[str, Any], given: str, limit: int | None
) -> list[Entry]:
    prompt, completion, empty = columns["prompt"], columns["completion"], columns.get("empty")
    shuffle = columns.get("shuffle")
    if shuffle is not None and not str(shuffle).isdecimal():
        raise InputError(f"{given}: shuffle is {shuffle!r}; expected a seed, a whole number.")

    def answered(row: Mapping[str, Any], where: str) -> Entry | None:
        blank = empty is None or not str(row[empty] or "").strip()
        if not (blank and row[prompt] and row[completion]):
            return None
        return chat(_filled(row, prompt, where), _filled(row, completion, where))

    names = [prompt, completion, *([empty] if empty else [])]
    seed = None if shuffle is None else int(shuffle)
    return _kept(reference, names, answered, limit, seed, "no row holds a prompt and a completion")


def _kept(
    reference: DatasetRef,
    columns: Sequence[str],
    entry: Callable[[Mapping[str, Any], str], Entry | None],
    limit: int | None,
    shuffle: int | None,
    nothing: str,
) -> list[Entry]:
    """The entries of a data set's rows, as many as the reference and `limit` allow."""
    wanted = min((n for n in (reference.limit, limit) if n is not None), default=None)
    rows = reference.rows(columns, shuffle=shuffle, stream=wanted is not None)
    entries = (entry(row, f"{reference}, row {number}") for number, row in enumerate(rows))
    kept = list(itertools.islice((e for e in entries if e is not None), wanted))
    if not kept:
        raise InputError(f"{reference}: {nothing}.")
    return kept


def _filled(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {key!r} has to be a text that is not empty, given {value!r}.")
    return value
