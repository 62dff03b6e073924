"""Take up an export that was killed: shards already written are kept where nothing has changed.

The staging folder holds a small record: a key of the plan and the source, and the finished files.
Knows files and plans; writes no weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vauban import __version__
from vauban.edits import EditPlan
from vauban.models import model_folder

RECORD = ".resume.json"


def resume_key(plan: EditPlan, model_path: str | Path, precision: str | None) -> str:
    """A digest of everything an export's weights depend on: plan, bases, options, source files."""
    folder = model_folder(model_path)
    digest = hashlib.sha256()
    for update in plan.updates:
        digest.update(f"{update.path} {update.alpha} {update.mode}".encode())
        digest.update(np.array(update.basis).tobytes())
    files = [
        (f.name, f.stat().st_size, f.stat().st_mtime_ns)
        for f in sorted(folder.glob("*"))
        if f.suffix in (".safetensors", ".json")
    ]
    facts = [__version__, plan.to_dict(), precision, str(folder.resolve()), files]
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    return digest.hexdigest()


class Finished:
    """The shards of a staging folder that are complete, with how their modules were stored."""

    def __init__(self, folder: Path, key: str | None) -> None:
        self._path = folder / RECORD
        self._key = key
        self._files: dict[str, dict[str, Any]] = {}
        if key is not None and self._path.is_file():
            record = read_record(folder)
            if record.get("key") == key:
                self._files = record["files"]

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
        partial = self._path.with_name(self._path.name + ".new")
        with partial.open("w") as stream:
            json.dump({"key": self._key, "files": self._files}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(self._path)

    def forget(self) -> None:
        """Remove the record: the folder is complete."""
        self._path.unlink(missing_ok=True)


def start_record(folder: Path, key: str) -> None:
    """Mark a staging folder as `key`'s, for work that keeps its own account of what is finished."""
    (folder / RECORD).write_text(json.dumps({"key": key, "files": {}}))


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a staging folder; {} where there is none or it is damaged."""
    try:
        found = json.loads((folder / RECORD).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) and "files" in found else {}
