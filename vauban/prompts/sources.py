"""Any way of naming prompts: files, the bundled sets, lists, data sets of the Hugging Face Hub.

Reads files through `sets`, and the Hub through `datasets`, which is imported only for a Hub data
set.
"""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from vauban.errors import InputError, VaubanWarning
from vauban.prompts.conversations import checked_messages
from vauban.prompts.sets import (
    checked_prompt,
    default_eval_path,
    default_preservation_path,
    default_prompt_paths,
    default_surface_path,
    load_prompts,
)

HUB_PREFIX = "hf:"

DEFAULT_SETS: dict[str, Callable[[], Path]] = {
    "harmful": lambda: default_prompt_paths()[0],
    "harmless": lambda: default_prompt_paths()[1],
    "eval": default_eval_path,
    "surface": default_surface_path,
    "preservation": default_preservation_path,
}

_REPO_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class DatasetRef:
    """A column of a data set on the Hugging Face Hub.

    `split` is what the `datasets` library accepts ("train", "test", "train[:200]"), `config` the
    subset of a data set that has several, `limit` the number of prompts to keep from the start,
    `revision` a branch, tag or commit.

    As text: `hf:org/name`, followed by `?key=value` pairs joined by `&` for what is not the
    default. `parse` reads that text and `str` writes it.

    >>> DatasetRef.parse("hf:org/name?split=test&limit=100")
    DatasetRef(repo_id='org/name', split='test', column='prompt', config=None, limit=100, \
revision=None)
    >>> str(DatasetRef("org/name", column="text"))
    'hf:org/name?column=text'

    Raises:
        InputError: a value that cannot be right, before anything is downloaded.
    """

    repo_id: str
    split: str = "train"
    column: str = "prompt"
    config: str | None = None
    limit: int | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.repo_id, str) or not _REPO_ID.fullmatch(self.repo_id):
            raise InputError(f"data set id {self.repo_id!r}: expected 'org/name'.")
        for name in ("split", "column"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise InputError(
                    f"{self.repo_id}: {name} has to be a name, given {getattr(self, name)!r}."
                )
        for name in ("config", "revision"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise InputError(f"{self.repo_id}: {name} has to be a name, given {value!r}.")
        whole = isinstance(self.limit, int) and not isinstance(self.limit, bool)
        if self.limit is not None and not (whole and self.limit > 0):
            raise InputError(
                f"{self.repo_id}: limit has to be a positive whole number, given {self.limit!r}."
            )

    @classmethod
    def parse(cls, text: str) -> DatasetRef:
        """Read `hf:org/name?split=test&column=text&config=main&limit=100` (the prefix may lack)."""
        repo_id, options = split_reference(text)
        return cls.from_options(repo_id, options, text)

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> DatasetRef:
        """Read a table as TOML gives it: {hf = "org/name", split = "test", limit = 100}."""
        repo_id, options = split_table(table)
        return cls.from_options(repo_id, options, f"{dict(table)!r}")

    @classmethod
    def from_options(cls, repo_id: str, options: Mapping[str, Any], given: str) -> DatasetRef:
        """A reference from its parts; `given` is what an error quotes."""
        known = [item.name for item in fields(cls)][1:]
        for key in options:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}."
                raise InputError(f"{given}: unknown key {key!r}; {hint}")
        return cls(repo_id, **options)

    def __str__(self) -> str:
        changed = [
            f"{item.name}={quote(str(getattr(self, item.name)), safe='[]:/+')}"
            for item in fields(self)[1:]
            if getattr(self, item.name) != item.default
        ]
        return HUB_PREFIX + self.repo_id + ("?" + "&".join(changed) if changed else "")

    def load(self) -> list[str]:
        """Download (or take from the cache) and return the column's texts, at most `limit`.

        Rows without a text are left out, with a warning that counts them.

        Raises:
            InputError: `datasets` is not installed, the Hub refuses, or there is no such split,
                subset or column.
        """
        return self._texts(self.rows([self.column]))

    def rows(
        self, columns: Sequence[str], *, shuffle: int | None = None, stream: bool = False
    ) -> Iterator[Mapping[str, Any]]:
        """The data set's rows with these columns only, all of them: `limit` is the caller's.

        `shuffle` is a seed for the library's own shuffling. `stream` reads row by row instead of
        downloading first, for sets that are larger than the disk; a split with a slice and a
        shuffled one are downloaded all the same.

        Raises InputError as `load` does.
        """
        try:
            import datasets
        except ImportError as error:
            raise InputError(
                f"{self}: reading data sets from the Hub needs the datasets library. "
                "Install it:  pip install datasets"
            ) from error
        stream = stream and shuffle is None and "[" not in self.split
        try:
            rows = datasets.load_dataset(
                self.repo_id,
                self.config,
                split=self.split,
                revision=self.revision,
                streaming=stream,
            )
            # A stream may know its columns only from a row.
            known = list(rows.column_names or (next(iter(rows), {}) if stream else []))
        except Exception as error:  # the library raises some twenty kinds, network ones included
            raise self._unread(error) from error
        for column in columns:
            if column not in known:
                raise InputError(
                    f"{self}: no column {column!r}; the columns there are: "
                    f"{', '.join(known) or 'none'}. Choose one with column=..."
                )
        kept = rows.select_columns(list(columns))
        return self._read(kept if shuffle is None else kept.shuffle(seed=shuffle))

    def _read(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """The rows; network errors while streaming become InputErrors as in `rows`."""
        reading = iter(rows)
        while True:
            try:
                row = next(reading)
            except StopIteration:
                return
            except Exception as error:
                raise self._unread(error) from error
            yield row

    def _unread(self, error: Exception) -> InputError:
        return InputError(
            f"{self}: could not be loaded ({type(error).__name__}: {error}). Check the "
            "name, split and config, and your connection or login (hf auth login)."
        )

    def _texts(self, rows: Iterable[Mapping[str, Any]]) -> list[str]:
        prompts: list[str] = []
        empty = 0
        for number, row in enumerate(rows):
            if len(prompts) == self.limit:
                break
            value = row[self.column]
            if value is None or (isinstance(value, str) and not value.strip()):
                empty += 1
                continue
            prompts.append(checked_prompt(value, f"{self}, row {number}, column {self.column!r}"))
        if not prompts:
            raise InputError(f"{self}: column {self.column!r} holds no texts.")
        if empty:
            warnings.warn(f"{self}: left out {empty} empty rows.", VaubanWarning, stacklevel=4)
        return prompts


def split_reference(text: str) -> tuple[str, dict[str, Any]]:
    """(org/name, options) of `hf:org/name?key=value&...`; raises InputError for a broken pair."""
    repo_id, _, query = text.removeprefix(HUB_PREFIX).partition("?")
    options: dict[str, Any] = {}
    for pair in filter(None, query.split("&")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"{text}: {pair!r} is not of the form key=value.")
        # unquote, not parse_qs: "+" joins splits ("train+test") and is no blank here.
        options[key] = unquote(value)
    if options.get("limit", "").isdecimal():  # anything else is refused by __post_init__
        options["limit"] = int(options["limit"])
    return repo_id, options


def split_table(table: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(org/name, options) of {hf = "org/name", ...}; raises InputError without the key `hf`."""
    options = dict(table)
    repo_id = options.pop("hf", None)
    if not isinstance(repo_id, str):
        raise InputError(
            f"prompt source {dict(table)!r}: a table needs the key 'hf' "
            'with the data set, like {hf = "org/name", column = "text"}.'
        )
    return repo_id.removeprefix(HUB_PREFIX), options


PromptSource = str | os.PathLike[str] | Mapping[str, Any] | Sequence[str] | DatasetRef
"""What `resolve_prompts` takes."""


def resolve_prompts(
    source: PromptSource,
    kind: str | None = None,
    *,
    base_dir: str | os.PathLike[str] | None = None,
    column: str | None = None,
) -> list[Any]:
    """Turn any way of naming prompts into the prompts.

    Args:
        source: a path; "default" for the bundled set of that `kind`; "hf:org/name?column=text";
            a table {hf = "org/name", ...}; a `DatasetRef`; or the prompts themselves.
        kind: "harmful", "harmless", "eval", "surface" or "preservation"; for "default" only.
        base_dir: the folder that relative paths start from (the current one if None).
        column: which column of a file holds the prompts (see `load_prompts`).

    Raises:
        InputError: what was given, what was expected.

    >>> resolve_prompts(["Name a colour."])
    ['Name a colour.']
    >>> len(resolve_prompts("default", kind="harmful"))
    128
    """
    if isinstance(source, DatasetRef):
        return source.load()
    if isinstance(source, Mapping):
        return DatasetRef.from_table(source).load()
    if isinstance(source, str) and source == "default":
        if kind not in DEFAULT_SETS:
            raise InputError(
                f"the source 'default' needs a kind, one of {', '.join(DEFAULT_SETS)}; "
                f"given {kind!r}."
            )
        return load_prompts(DEFAULT_SETS[kind]())
    if isinstance(source, str) and source.startswith(HUB_PREFIX):
        return DatasetRef.parse(source).load()
    if isinstance(source, str | os.PathLike):
        return load_prompts(Path(base_dir or ".") / source, column=column)
    if isinstance(source, Iterable) and not isinstance(source, bytes):
        prompts = [
            checked_messages(item, f"prompt {i}")
            if isinstance(item, list | tuple)
            else checked_prompt(item, f"prompt {i}")
            for i, item in enumerate(source)
        ]
        if prompts:
            return prompts
        raise InputError("the list of prompts is empty; give at least one.")
    raise InputError(
        f"prompts cannot be read from {type(source).__name__}; give a path, 'default', "
        "'hf:org/name', a table with the key 'hf', a DatasetRef or a list of texts."
    )
