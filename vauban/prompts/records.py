"""The rows of a prompt file, with the line each comes from: JSONL, JSON lists, CSV, TSV, parquet.

Knows files and their formats; knows nothing of prompts but the names that their column may have.
"""

from __future__ import annotations

import csv
import io
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vauban._extras import need
from vauban.errors import InputError, VaubanWarning, shown

JSON_SUFFIXES = (".jsonl", ".json")
"""Suffixes read as one JSON object per line; a .json file may hold a list of them."""

TABLE_SUFFIXES = (".csv", ".tsv", ".parquet")
"""Suffixes read as tables with named columns."""

COLUMNS = ("prompt", "goal", "text", "instruction", "behavior", "question", "query", "request")
"""Names that the prompts' column may have, in this order; capitals do not count."""

Row = tuple[str, dict[str, Any]]
"""("file, line n", values by name)."""

# What the first bytes of a text in another encoding are; the longer ones come first.
_MARKS = ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"),
          (b"\xfe\xff", "UTF-16"))  # fmt: skip
_LONE_RETURN = re.compile(rb"\r(?!\n)")


def has_rows(path: Path) -> bool:
    """Whether a file of this name is read as rows with named values, and not as plain text."""
    return path.suffix.lower() in (*JSON_SUFFIXES, *TABLE_SUFFIXES)


def file_rows(path: Path) -> list[Row]:
    """The rows of a file, at least one; InputError names the file and the line."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        rows = _parquet_rows(path)
    elif suffix in TABLE_SUFFIXES:
        rows = list(_table_rows(path))
    elif suffix == ".json" and read_bytes(path).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        rows = list(_list_rows(path))
    else:
        rows = [(where, parse_object(text, where)) for where, text in filled_lines(path)]
    if not rows:
        raise InputError(f"{path}: holds no prompts; write at least one line.")
    return rows


def prompt_column(path: Path, rows: Sequence[Row], column: str | None = None) -> str:
    """The name under which the rows hold their prompts: `column`, else the first of `COLUMNS`.

    Warns which it is where the file does not say `prompt` and nobody chose. InputError where the
    first row has no such name.
    """
    where, first = rows[0]
    names = ", ".join(map(repr, first)) or "none"
    if column is not None:
        if column not in first:
            raise InputError(f"{where}: no column {column!r}; the columns of this file: {names}.")
        return column
    folded: dict[str, str] = {}
    for name in first:
        folded.setdefault(str(name).lower(), name)
    chosen = next((folded[name] for name in COLUMNS if name in folded), None)
    if chosen is None:
        kind = "line" if path.suffix.lower() == ".jsonl" else "file"
        raise InputError(
            f"{where}: no key 'prompt'; the keys of this {kind}: {names}. Expected one of "
            f"{', '.join(COLUMNS)}, or name the column (column=, --column); a file without a "
            "header, one prompt per line, ends in .txt."
        )
    if chosen != "prompt":
        warnings.warn(
            f"{path}: the prompts are read from {chosen!r} (of {names}); choose another with "
            "column= (--column).",
            VaubanWarning,
            stacklevel=4,
        )
    return chosen


def read_bytes(path: Path) -> bytes:
    """A file's bytes; InputError for what is no readable file."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the prompt file inside it.")
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such file; give a .jsonl file with the key 'prompt' on every line, a "
            ".csv, .tsv or .parquet file with named columns, or a text file with one prompt per "
            "line (a Hub data set is written hf:org/name)."
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise InputError(f"{path}: cannot be read ({error}).") from error


def decode(raw: bytes, where: str) -> str:
    """Text of UTF-8 bytes, without a byte order mark."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: byte {raw[error.start]:#04x} is not valid UTF-8; save the file as UTF-8."
        ) from error


def filled_lines(path: Path) -> Iterator[tuple[str, str]]:
    """("file, line n", text) of every line that is not blank; n counts from 1."""
    # Split the bytes at "\n" alone: str.splitlines would also cut inside prompts that hold
    # U+2028 or a form feed, and decoding line by line lets an error name its line.
    for number, raw in enumerate(_text_bytes(path).split(b"\n"), start=1):
        where = f"{path}, line {number}"
        if _LONE_RETURN.search(raw[:-1]):
            raise InputError(
                f"{where}: holds a carriage return without a line feed, as old Mac programs end "
                "their lines; save the file with LF or CRLF line ends."
            )
        text = decode(raw, where)
        if text.strip():
            yield where, text


def read_objects(path: Path) -> Iterator[Row]:
    """("file, line n", object) of every line of a JSONL file that is not blank.

    Raises InputError for a line that is no object; it says so where the file seems cut off.
    """
    lines = list(filled_lines(path))
    ended = read_bytes(path).endswith(b"\n")
    for number, (where, text) in enumerate(lines, start=1):
        try:
            yield where, parse_object(text, where)
        except InputError as error:
            if number == len(lines) and not ended:
                raise InputError(f"{where}: the file is cut off inside this line.") from error
            raise


def parse_object(text: str, where: str) -> dict[str, Any]:
    """The JSON object that a text holds."""
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


def _text_bytes(path: Path) -> bytes:
    """The bytes of a file that may be UTF-8; InputError names another encoding."""
    raw = read_bytes(path)
    for mark, encoding in _MARKS:
        if raw.startswith(mark):
            raise InputError(f"{path}: is encoded as {encoding}; save the file as UTF-8.")
    null = raw.find(b"\0")
    if null >= 0:
        line = raw.count(b"\n", 0, null) + 1
        raise InputError(
            f"{path}, line {line}: holds a null byte, so this is UTF-16 or no text; save the file "
            "as UTF-8."
        )
    return raw


def _whole_text(path: Path) -> str:
    lines = _text_bytes(path).split(b"\n")
    return "\n".join(decode(raw, f"{path}, line {n}") for n, raw in enumerate(lines, start=1))


def _list_rows(path: Path) -> Iterator[Row]:
    """The entries of a JSON list; a text stands for {"prompt": text}."""
    text, decoder = _whole_text(path), json.JSONDecoder()
    blank = re.compile(r"[ \t\r\n]*")

    def after_blanks(place: int) -> int:
        match = blank.match(text, place)
        return match.end() if match else place

    def place_of(index: int) -> str:
        return f"{path}, line {text.count(chr(10), 0, index) + 1}"

    at = after_blanks(after_blanks(0) + 1)
    while text[at : at + 1] != "]":
        where = place_of(at)
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not valid JSON ({error}) in a list.") from error
        if not isinstance(value, dict | str):
            raise InputError(
                f"{where}: expected a text or an object in the list, given {shown(value)}."
            )
        yield where, {"prompt": value} if isinstance(value, str) else value
        at = after_blanks(at)
        if text[at : at + 1] == ",":
            at = after_blanks(at + 1)
        elif text[at : at + 1] != "]":
            raise InputError(f"{place_of(at)}: expected a comma or ] after an entry of the list.")
    if text[at + 1 :].strip():
        raise InputError(f"{place_of(at)}: the list ends, but the file goes on.")


def _table_rows(path: Path) -> Iterator[Row]:
    """The rows under the header of a CSV or TSV file, quoted as spreadsheets do."""
    text = _whole_text(path)
    header_line = text.lstrip("\r\n").partition("\n")[0].partition("\r")[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{path}, line {line}: no valid row ({error}).") from error
        where = f"{path}, line {line}"
        if not any(value.strip() for value in values):
            continue
        if not header:
            header = [value.strip() for value in values]
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise InputError(f"{where}: two columns are called {twice[0]!r}.")
        elif len(values) != len(header):
            raise InputError(
                f"{where}: {len(values)} fields under a header of {len(header)} columns "
                f"({', '.join(map(repr, header))}); put texts that hold {delimiter!r} in quotes."
            )
        else:
            yield where, dict(zip(header, values, strict=True))


def _parquet_rows(path: Path) -> list[Row]:
    raw = read_bytes(path)
    parquet = need("pyarrow.parquet", "data", f"{path}: reading parquet")
    try:
        rows = parquet.read_table(io.BytesIO(raw)).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise InputError(f"{path}: is no parquet file ({error}).") from error
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows, start=1)]
