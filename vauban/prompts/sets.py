"""Prompt files: their prompts and labels, the bundled sets, a model folder's own sets.

Knows files and their lines; knows nothing of tokenizers, models or the network.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import Any, TypeVar

from vauban._paths import data_dir
from vauban.errors import InputError, shown
from vauban.prompts.conversations import checked_messages
from vauban.prompts.records import (
    decode,
    file_rows,
    filled_lines,
    has_rows,
    parse_object,
    prompt_column,
)

T = TypeVar("T")
Prompt = Any
"""A text, or the messages of a conversation (`Conversation`)."""
MESSAGES = "messages"
"""The key of a row that holds a conversation instead of a prompt."""

MODEL_PROMPTS_FILE = "vauban.json"
"""The file in which a model folder may name its own prompt sets."""


@dataclass(frozen=True)
class LabelledPrompt:
    """One row of a labelled set; further keys of the line are attributes and items too.

    >>> row = LabelledPrompt("How do I sharpen a chisel?", "harmless", {"kind": "how-to"})
    >>> row.kind, row["kind"], row["prompt"], row.get("language", "en")
    ('how-to', 'how-to', 'How do I sharpen a chisel?', 'en')
    """

    prompt: Prompt
    label: str
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        extra = {key: value for key, value in self.extra.items() if key != "label"}
        object.__setattr__(self, "extra", MappingProxyType(extra))

    def __reduce__(self) -> tuple[type[LabelledPrompt], tuple[str, str, dict[str, Any]]]:
        # A mapping proxy can be neither pickled nor copied; the plain dictionary can.
        return type(self), (self.prompt, self.label, dict(self.extra))

    def to_dict(self) -> dict[str, Any]:
        """The row as the line of a JSONL file holds it."""
        key = "prompt" if isinstance(self.prompt, str) else MESSAGES
        return {key: self.prompt, "label": self.label, **self.extra}

    def keys(self) -> list[str]:
        return list(self.to_dict())

    def get(self, key: str, default: Any = None) -> Any:
        return self.to_dict().get(key, default)

    def __getitem__(self, key: str) -> Any:
        return self.to_dict()[key]

    def __getattr__(self, name: str) -> Any:
        # Reached only when normal lookup fails; "extra" itself is missing while unpickling.
        if name != "extra" and name in self.extra:
            return self.extra[name]
        raise AttributeError(f"this row has no {name!r}; it holds {', '.join(self.keys())}")


@dataclass(frozen=True)
class ModelPrompts:
    """The prompt sets that a model folder brings along; None where it names none."""

    harmful: Path | None = None
    harmless: Path | None = None
    eval: Path | None = None
    surface: Path | None = None


def load_prompts(path: str | os.PathLike[str], *, column: str | None = None) -> list[Any]:
    """Read a prompt file by its suffix.

    JSONL (.jsonl, .json), a JSON list of texts or objects (.json), tables with a header (.csv,
    .tsv) and parquet hold their prompts under `column`. Without it that is `prompt`, else the
    first of goal, text, instruction, behavior, question, query, request, which a warning names.
    Any other file is plain text, one prompt per line. A row may hold a conversation instead, under
    `messages`: a list of {"role": ..., "content": ...} whose last message is the user's.

    Blank lines are skipped, other columns are ignored, and a byte order mark is allowed.

    Returns:
        The prompts in file order, at least one: texts, and conversations as tuples of messages.

    Raises:
        InputError: names the file and the line, its content and what was expected.

    >>> harmful, harmless = default_prompt_paths()
    >>> len(load_prompts(harmful)), len(load_prompts(harmless))
    (128, 128)
    """
    path = Path(path)
    if has_rows(path):
        return [prompt for _, _, prompt in _prompt_rows(path, column)]
    if column is not None:
        raise InputError(f"{path}: is plain text without columns; column {column!r} is not in it.")
    prompts = [checked_prompt(text.strip(), where) for where, text in filled_lines(path)]
    if not prompts:
        raise InputError(f"{path}: holds no prompts; write at least one line.")
    return prompts


def load_labelled_prompts(
    path: str | os.PathLike[str], *, column: str | None = None
) -> list[LabelledPrompt]:
    """Read rows with a prompt, a `label` and whatever else, from any file with named columns.

    The prompt's column is chosen as `load_prompts` does.

    Returns:
        Rows in file order; at least one.

    Raises:
        InputError: as for `load_prompts`; also when `label` is missing or not a text.

    >>> rows = load_labelled_prompts(default_eval_path())
    >>> rows[0].label, sorted({row.label for row in rows})
    ('harmful', ['harmful', 'harmless'])
    """
    path = Path(path)
    if not has_rows(path):
        raise InputError(
            f"{path}: labelled prompts need a JSONL file (.jsonl or .json) or a table (.csv, .tsv, "
            f".parquet) with 'prompt' and 'label', given a {path.suffix or 'suffix-less'} file."
        )
    return [
        LabelledPrompt(prompt, _label(row, where), row)
        for where, row, prompt in _prompt_rows(path, column)
    ]


def _prompt_rows(path: Path, column: str | None) -> list[tuple[str, dict[str, Any], Prompt]]:
    """("file, line n", the row without its prompt, the prompt) of a file with named columns.

    A row without the prompts' column may hold its prompt under `messages`.
    """
    rows = file_rows(path)
    texts = [row for row in rows if MESSAGES not in row[1]]
    if column is not None or not texts:
        texts = rows
    whole = column is None and all(MESSAGES in row and "prompt" not in row for _, row in rows)
    name = MESSAGES if whole else prompt_column(path, texts, column)
    read: list[tuple[str, dict[str, Any], Prompt]] = []
    for where, row in rows:
        key = MESSAGES if name not in row and MESSAGES in row else name
        value = _value(row, key, where)
        prompt = checked_messages(value, where) if key == MESSAGES else checked_prompt(value, where)
        read.append((where, {k: v for k, v in row.items() if k != key}, prompt))
    return read


def default_prompt_paths() -> tuple[Path, Path]:
    """The bundled measuring sets (harmful, harmless), 128 prompts each.

    >>> import vauban
    >>> [len(vauban.load_prompts(path)) for path in default_prompt_paths()]
    [128, 128]
    """
    folder = data_dir() / "prompts"
    return folder / "harmful.jsonl", folder / "harmless.jsonl"


def default_eval_path() -> Path:
    """The bundled labelled evaluation set, harmful prompts first, none used for measuring.

    >>> import vauban
    >>> {row.label for row in vauban.load_labelled_prompts(default_eval_path())[:32]}
    {'harmful'}
    """
    return data_dir() / "prompts" / "eval.jsonl"


def default_surface_path() -> Path:
    """The bundled labelled set over categories, styles and languages, for surface maps.

    >>> import vauban
    >>> len(vauban.load_surface_prompts(default_surface_path()))
    144
    """
    return data_dir() / "prompts" / "surface.jsonl"


def default_preservation_path() -> Path:
    """The bundled prompts whose processing an edit should leave as it is.

    >>> import vauban
    >>> len(vauban.load_prompts(default_preservation_path())) >= 40
    True
    """
    return data_dir() / "prompts" / "preservation.jsonl"


def model_prompt_sets(model_path: str | os.PathLike[str]) -> ModelPrompts | None:
    """The prompt sets that a local model folder names in its `vauban.json`.

    The file is a JSON object with any of the keys `harmful`, `harmless`, `eval` and `surface`; each
    value is a path relative to the folder. Other keys are left alone.

    Returns:
        None when `model_path` is no folder (a Hub id, say) or holds no `vauban.json`.

    Raises:
        InputError: broken JSON, a path that leaves the folder, or a file that is not there.
    """
    folder = Path(model_path)
    source = folder / MODEL_PROMPTS_FILE
    if not source.is_file():
        return None
    table = parse_object(decode(source.read_bytes(), str(source)), str(source))
    keys = [field.name for field in fields(ModelPrompts)]
    named = {key: table[key] for key in keys if table.get(key)}
    return ModelPrompts(**{key: _inside(folder, value, key) for key, value in named.items()})


def measuring_paths(model_path: str | os.PathLike[str] | None = None) -> tuple[Path, Path]:
    """(harmful, harmless): the sets that a model's folder names to measure on, else the bundled.

    >>> measuring_paths() == default_prompt_paths()
    True
    """
    named = (model_path and model_prompt_sets(model_path)) or ModelPrompts()
    harmful, harmless = default_prompt_paths()
    return named.harmful or harmful, named.harmless or harmless


def checked_prompt(text: Any, where: str) -> str:
    """`text` if it is a prompt a tokenizer can take; otherwise an InputError naming `where`."""
    if not isinstance(text, str):
        raise InputError(
            f"{where}: a prompt has to be a text, given {type(text).__name__} {shown(text)}."
        )
    if not text.strip():
        raise InputError(f"{where}: the prompt is empty; write a text or remove the entry.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: the prompt holds half of a surrogate pair "
            f"({text[error.start]!a}), which no tokenizer can encode; write the whole character."
        ) from error
    return text


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items at even distances, the first one included.

    >>> spread("abcdefgh", 3)
    ['a', 'c', 'f']
    """
    if count <= 0:
        return []
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def _inside(folder: Path, value: Any, key: str) -> Path:
    """The file that `vauban.json` names, after checking that it lies in the model folder."""
    where = f"{folder / MODEL_PROMPTS_FILE}: {key}"
    if not isinstance(value, str) or "\0" in value:
        raise InputError(f"{where}: expected a path relative to the folder, given {shown(value)}.")
    parts = PurePosixPath(value).parts + PureWindowsPath(value).parts
    absolute = PurePosixPath(value).is_absolute() or PureWindowsPath(value).anchor
    root = folder.resolve()
    target = (folder / value).resolve()
    # The Hub's cache keeps files as links from snapshots/<revision> into blobs beside it.
    roots = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    if absolute or ".." in parts or not any(target.is_relative_to(place) for place in roots):
        raise InputError(
            f"{where}: {value!r} leads out of the model folder; "
            "prompt sets have to lie inside it and be named by a relative path."
        )
    if not target.is_file():
        raise InputError(f"{where}: {value!r} is not a file in {folder}.")
    return folder / value


def _value(row: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in row:
        keys = ", ".join(map(repr, row)) or "none"
        raise InputError(f"{where}: no key {key!r}; the keys of this line: {keys}.")
    return row[key]


def _label(row: Mapping[str, Any], where: str) -> str:
    label = _value(row, "label", where)
    if not isinstance(label, str) or not label.strip():
        raise InputError(
            f"{where}: 'label' has to be a text that is not empty, given {shown(label)}."
        )
    return label
