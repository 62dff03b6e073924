"""The folder that a run wrote, read again: its document and its answers. Opens no model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vauban.errors import InputError
from vauban.prompts import read_objects

RUN_FILE, ANSWERS_FILE, SEARCH_FILE = "run.json", "answers.jsonl", "search.json"
_NEEDED = ("label", "prompt", "refused_modified", "degenerate_modified")


def read_run(folder: str | Path) -> dict[str, Any]:
    """The document of a run that cut a direction and evaluated it.

    Raises InputError for a folder without run.json, a damaged one, or a run of another kind.
    """
    folder = Path(folder)
    file = folder / RUN_FILE
    if not file.is_file():
        raise InputError(
            f"{folder}: no {RUN_FILE} in it; expected the folder that a run wrote (vauban MODEL -o)"
        )
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(document, dict) or not isinstance(document.get("evaluation"), dict):
        kind = document.get("kind") if isinstance(document, dict) else None
        raise InputError(
            f"{file}: holds {f'an {kind}' if kind else 'no run'}; expected a run that cut a "
            "direction and evaluated it"
        )
    if "refusal_rate_modified" not in document["evaluation"]:
        raise InputError(f"{file}: its evaluation has no refusal rates; expected a run's figures")
    run: dict[str, Any] = document
    return run


def read_answers(folder: str | Path, run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of answers.jsonl, as many as the document says.

    Raises InputError, with file and line, for a row without a needed key and for a file that ends
    too early.
    """
    file = Path(folder) / ANSWERS_FILE
    rows = []
    for where, row in read_objects(file):
        missing = [key for key in _NEEDED if key not in row]
        if missing:
            keys = ", ".join(map(repr, row)) or "none"
            raise InputError(f"{where}: no key {missing[0]!r}; the keys of this line: {keys}")
        rows.append(row)
    evaluation = run["evaluation"]
    expected = evaluation.get("num_prompts", 0) + evaluation.get("num_harmless", 0)
    if expected and len(rows) != expected:
        raise InputError(
            f"{file}, line {len(rows)}: the file ends after {len(rows)} answers and {RUN_FILE} "
            f"says {expected}; it is cut off. Take the run's own file"
        )
    return rows
