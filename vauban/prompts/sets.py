"""Prompt files: reading JSONL and plain text, the bundled sets, a model folder's own sets.

Knows files and their lines; knows nothing of tokenizers, models or the network.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import Any, TypeVar

from vauban._paths import data_dir
from vauban.errors import InputError, shown

T = TypeVar("T")

JSON_SUFFIXES = (".jsonl", ".json")
"""Suffixes read as one JSON object per line; every other file is plain text."""

MODEL_PROMPTS_FILE = "vauban.json"
"""The file in which a model folder may name its own prompt sets."""


@dataclass(frozen=True)
class LabelledPrompt:
    """One row of a labelled set; further keys of the line are attributes and items too.

    >>> row = LabelledPrompt("How do I sharpen a chisel?", "harmless", {"kind": "how-to"})
    >>> row.kind, row["kind"], row["prompt"], row.get("language", "en")
    ('how-to', 'how-to', 'How do I sharpen a chisel?', 'en')
    """

    prompt: str
    label: str
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "extra", MappingProxyType(dict(self.extra)))

    def __reduce__(self) -> tuple[type[LabelledPrompt], tuple[str, str, dict[str, Any]]]:
        # A mapping proxy can be neither pickled nor copied; the plain dictionary can.
        return type(self), (self.prompt, self.label, dict(self.extra))

    def to_dict(self) -> dict[str, Any]:
        """The row as the line of a JSONL file holds it."""
        return {"prompt": self.prompt, "label": self.label, **self.extra}

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


def load_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Read a prompt file: JSONL with the key `prompt` (.jsonl, .json) or one prompt per line.

    Blank lines are skipped, other keys of a JSON line are ignored, and a byte order mark is
    allowed.

    Returns:
        The prompts in file order; at least one.

    Raises:
        InputError: names the file and the line, its content and what was expected.

    >>> harmful, harmless = default_prompt_paths()
    >>> len(load_prompts(harmful)), len(load_prompts(harmless))
    (128, 128)
    """
    path = Path(path)
    if path.suffix.lower() in JSON_SUFFIXES:
        return [_text_of(row, "prompt", where) for where, row in json_rows(path)]
    prompts = [checked_prompt(text.strip(), where) for where, text in _filled_lines(path)]
    return _not_empty(prompts, path)


def load_labelled_prompts(path: str | os.PathLike[str]) -> list[LabelledPrompt]:
    """Read a JSONL file whose lines hold `prompt`, `label` and whatever else.

    Returns:
        Rows in file order; at least one.

    Raises:
        InputError: as for `load_prompts`; also when `label` is missing or not a text.

    >>> rows = load_labelled_prompts(default_eval_path())
    >>> rows[0].label, sorted({row.label for row in rows})
    ('harmful', ['harmful', 'harmless'])
    """
    path = Path(path)
    if path.suffix.lower() not in JSON_SUFFIXES:
        raise InputError(
            f"{path}: labelled prompts need a JSONL file (.jsonl or .json) with the keys "
            f"'prompt' and 'label' on every line, given a {path.suffix or 'suffix-less'} file."
        )
    return [
        LabelledPrompt(
            _text_of(row, "prompt", where),
            _text_of(row, "label", where),
            {key: value for key, value in row.items() if key not in ("prompt", "label")},
        )
        for where, row in json_rows(path)
    ]


def default_prompt_paths() -> tuple[Path, Path]:
    """The bundled measuring sets (harmful, harmless), 128 prompts each."""
    folder = data_dir() / "prompts"
    return folder / "harmful.jsonl", folder / "harmless.jsonl"


def default_eval_path() -> Path:
    """The bundled labelled evaluation set, harmful prompts first, none used for measuring."""
    return data_dir() / "prompts" / "eval.jsonl"


def default_surface_path() -> Path:
    """The bundled labelled set over categories, styles and languages, for surface maps."""
    return data_dir() / "prompts" / "surface.jsonl"


def default_preservation_path() -> Path:
    """The bundled prompts whose processing an edit should leave as it is."""
    return data_dir() / "prompts" / "preservation.jsonl"


def model_prompt_sets(model_path: str | os.PathLike[str]) -> ModelPrompts | None:
    """The prompt sets that a local model folder names in its `vauban.json`.

    The file is a JSON object with any of the keys `harmful`, `harmless` and `eval`; each value
    is a path relative to the folder. Other keys are left alone.

    Returns:
        None when `model_path` is no folder (a Hub id, say) or holds no `vauban.json`.

    Raises:
        InputError: broken JSON, a path that leaves the folder, or a file that is not there.
    """
    folder = Path(model_path)
    source = folder / MODEL_PROMPTS_FILE
    if not source.is_file():
        return None
    table = _parse_object(_decode(source.read_bytes(), str(source)), str(source))
    named = {key: table[key] for key in ("harmful", "harmless", "eval") if table.get(key)}
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


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the prompt file inside it.")
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such file; give a .jsonl file with the key 'prompt' on every line, "
            "or a text file with one prompt per line (a Hub data set is written hf:org/name)."
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise InputError(f"{path}: cannot be read ({error}).") from error


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: byte {raw[error.start]:#04x} is not valid UTF-8; save the file as UTF-8."
        ) from error


def _filled_lines(path: Path) -> Iterator[tuple[str, str]]:
    """("file, line n", text) of every line that is not blank; n counts from 1."""
    # Split the bytes at "\n" alone: str.splitlines would also cut inside prompts that hold
    # U+2028 or a form feed, and decoding line by line lets an error name its line.
    for number, raw in enumerate(_read(path).split(b"\n"), start=1):
        where = f"{path}, line {number}"
        text = _decode(raw, where)
        if text.strip():
            yield where, text


def json_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """("file, line n", object) of every line of a JSONL file; InputError for anything else."""
    rows = [(where, _parse_object(text, where)) for where, text in _filled_lines(path)]
    return _not_empty(rows, path)


def _parse_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f'{where}: not valid JSON ({error}); expected one object, like {{"prompt": "..."}}.'
        ) from error
    if not isinstance(value, dict):
        raise InputError(
            f'{where}: expected a JSON object, like {{"prompt": "..."}}, given {shown(value)}.'
        )
    return value


def _text_of(row: dict[str, Any], key: str, where: str) -> str:
    if key not in row:
        keys = ", ".join(map(repr, row)) or "none"
        raise InputError(f"{where}: no key {key!r}; the keys of this line: {keys}.")
    if key == "prompt":
        return checked_prompt(row[key], where)
    if not isinstance(row[key], str) or not row[key].strip():
        raise InputError(
            f"{where}: {key!r} has to be a text that is not empty, given {shown(row[key])}."
        )
    return row[key]


def _not_empty(rows: list[Any], path: Path) -> list[Any]:
    if not rows:
        raise InputError(f"{path}: holds no prompts; write at least one line.")
    return rows
