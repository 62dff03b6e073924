"""Take up an export that was killed: shards already written are kept where nothing has changed.

The staging folder holds a small record: a key of the plan and the source, and the finished files.
Knows files and plans; writes no weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from vauban import __version__
from vauban.edits.plan import EditPlan
from vauban.errors import InputError
from vauban.export.calibrate import inputs_of
from vauban.export.tensor_files import to_bytes
from vauban.models import model_folder

RECORD = ".resume.json"
_HALF = f"{RECORD}.new"


def resume_key(
    plan: EditPlan, model_path: str | Path, precision: str | None, layout: str = "same"
) -> str:
    """A digest of everything an export's weights depend on: plan, arrays, options, source files.

    Every field of every update counts, what it protects and what it reads included.
    """
    folder = model_folder(model_path)
    digest = hashlib.sha256()
    files = [
        (f.name, f.stat().st_size, f.stat().st_mtime_ns)
        for f in sorted(folder.glob("*"))
        if f.suffix in (".safetensors", ".json")
    ]
    options = (__version__, precision, layout, str(folder.resolve()), files)
    inputs = tuple(inputs_of(plan).items())
    for part in (plan_text(plan), plan.updates, inputs, plan.basis, plan.embedding, options):
        _take_in(digest, part)
    return digest.hexdigest()


def plan_text(plan: EditPlan) -> str:
    """The plan's facts as JSON; InputError where a setting is no plain value."""
    try:
        return json.dumps(plan.to_dict(), sort_keys=True)
    except TypeError as error:
        raise InputError(
            f"the plan's settings cannot be recorded: {error}; expected Python numbers and text"
        ) from error


def digest_of(value: Any) -> str:
    """A digest of a frozen value with all of its fields."""
    digest = hashlib.sha256()
    _take_in(digest, value)
    return digest.hexdigest()


def _take_in(digest: Any, value: Any) -> None:
    """Add a value to a digest: arrays by type, shape and bytes, the rest field by field."""
    if isinstance(value, mx.array | np.ndarray):
        digest.update(f"array {value.dtype} {tuple(value.shape)}:".encode())
        digest.update(to_bytes(value) if isinstance(value, mx.array) else value.tobytes())
    elif is_dataclass(value):
        digest.update(f"{type(value).__name__}:".encode())
        for field in fields(value):
            digest.update(f".{field.name}".encode())
            _take_in(digest, getattr(value, field.name))
    elif isinstance(value, tuple | list):
        digest.update(f"{len(value)} of:".encode())
        for part in value:
            _take_in(digest, part)
    elif value is None or isinstance(value, bool | int | float | str):
        digest.update(f"{type(value).__name__} {value!r};".encode())
    else:
        raise TypeError(f"no digest of a {type(value).__name__}; expected arrays and plain values")


class Finished:
    """The shards of a staging folder that are complete, with how their modules were stored."""

    def __init__(self, folder: Path, key: str | None) -> None:
        self._path = folder / RECORD
        self._key = key
        self._files: dict[str, dict[str, Any]] = {}
        if key is None:
            return
        record = read_record(folder)
        if record.get("key") == key:
            self._files = record["files"]
        else:
            # From the first byte on the folder is known as this export's.
            start_record(folder, key)

    def outcomes(self, file: Path) -> dict[str, Any] | None:
        """What was noted of a finished file; None where it has to be written."""
        noted = self._files.get(file.name)
        if noted is None or not file.is_file() or file.stat().st_size != noted["size"]:
            return None
        return noted["outcomes"]

    def note(self, file: Path, outcomes: Mapping[str, Any]) -> None:
        """Record a file that is complete and synced."""
        if self._key is None:
            return
        self._files[file.name] = {"size": file.stat().st_size, "outcomes": dict(outcomes)}
        partial = self._path.with_name(_HALF)
        with partial.open("w") as stream:
            json.dump({"key": self._key, "files": self._files}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(self._path)


def start_record(folder: Path, key: str) -> None:
    """Mark a staging folder as `key`'s, for work that keeps its own account of what is finished."""
    (folder / RECORD).write_text(json.dumps({"key": key, "files": {}}))


def forget_record(folder: Path) -> None:
    """Remove the record: all is written and read back, nothing is left to take up."""
    for name in (RECORD, _HALF):
        (folder / name).unlink(missing_ok=True)


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a staging folder; {} where there is none or it is damaged."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return record if isinstance(record, dict) and "files" in record else {}
