"""What a study has finished so far, line by line on disk, so that a killed one goes on.

Knows a folder and JSON values.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vauban.export import RECORD, start_record

_FILE = ".journal.jsonl"


class Journal:
    """Finished pieces of work by name. `once` computes a piece, or returns what was recorded."""

    def __init__(self, folder: Path, key: str) -> None:
        self._path = folder / _FILE
        self._values: dict[str, Any] = {}
        self.resumed = 0
        """Pieces that an earlier, killed process had finished."""
        start_record(folder, key)
        if self._path.is_file():
            lines = self._path.read_text().splitlines(keepends=True)
            # The last line of a killed process may be cut off; it is done again.
            whole = [line for line in lines if line.endswith("\n")]
            self._path.write_text("".join(whole))
            self._values = {e["name"]: e["value"] for e in map(json.loads, whole)}
            self.resumed = len(self._values)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """The recorded value of `name`, else `work()`, recorded and synced; JSON-safe values."""
        if name not in self._values:
            line = json.dumps({"name": name, "value": work()}, ensure_ascii=False)
            with self._path.open("a") as stream:
                stream.write(line + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            # As it will be read back, so that a resumed study is the same study.
            self._values[name] = json.loads(line)["value"]
        return self._values[name]

    def close(self) -> None:
        """Remove the journal: the folder is complete."""
        self._path.unlink(missing_ok=True)
        self._path.with_name(RECORD).unlink(missing_ok=True)
