"""What can be known of the disk before anything is computed: may it be written, is there room.

Knows paths and the headers of weight files; reads no tensor and loads no model.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vauban.errors import InputError
from vauban.export.tensor_files import stored_tensors
from vauban.models import WRITER_NAMES, weight_files

# run.json, answers, card and logs: more than any run has written.
SIDE_FILES = 1_000_000
_HEAD = ("lm_head.weight", "language_model.lm_head.weight")
_TABLES = ("embed_tokens.weight", "wte.weight", "embedding.weight", "embeddings.weight")


def nearest_folder(path: Path) -> Path:
    """The deepest folder above `path` that exists, links followed."""
    place = path.absolute().parent
    while not place.exists():
        place = place.parent
    return place


def check_place(target: str | Path) -> Path:
    """The nearest existing folder above `target`; InputError where nothing can be created there.

    A file is created and removed, as permissions do not tell of read-only disks and quotas.
    """
    path = Path(target).expanduser().absolute()
    place = nearest_folder(path)
    if not place.is_dir():
        raise InputError(f"{path}: {place} is a file; expected a folder, choose another place (-o)")
    # As long as the name that the folder bears while it is written.
    probe = place / f".{path.name}.partial-probe-{os.getpid()}"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {place}: {error.strerror}; choose another place (-o)"
        ) from error
    return place


def check_room(target: str | Path, needed: int) -> int:
    """The bytes that are free for `target`; InputError with both figures where they are too few.

    What an interrupted run has left there counts as free: the next one takes it up or removes it.
    """
    path = Path(target).expanduser().absolute()
    place = nearest_folder(path)
    free = shutil.disk_usage(place).free
    for abandoned in place.glob(f".{path.name}.partial-*") if place == path.parent else ():
        free += sum(f.stat().st_size for f in abandoned.rglob("*") if f.is_file())
    if free < needed:
        raise InputError(
            f"{path} needs {_size(needed)} and {place} has {_size(free)} free; free "
            f"{_size(needed - free)} or choose another place (-o)"
        )
    return free


def export_bytes(
    folder: Path, precision: str | None = None, *, unties: bool = False, directions: int = 1
) -> int:
    """The bytes that an export of the model in `folder` writes, by the headers of its files.

    "8bit" and "float" widen the packed writers, an untied head is a second table, an adapter has
    `directions` rows and columns for every writer.
    """
    stored = stored_tensors(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writers = {
        name.removesuffix(".weight"): tensor
        for name, tensor in stored.items()
        if name.endswith(".weight") and len(tensor.shape) > 1 and _writes(name)
    }
    if precision == "adapter":
        sides = sum(
            math.prod(t.shape[:-2]) * (t.shape[-2] + _inputs(config, path, t.shape, stored))
            for path, t in writers.items()
        )
        return SIDE_FILES + 4 * directions * sides
    total = SIDE_FILES + sum(f.stat().st_size for f in weight_files(folder).files)
    for path, tensor in writers.items():
        if f"{path}.scales" not in stored or precision not in ("float", "8bit"):
            continue
        count = math.prod(tensor.shape[:-1]) * _inputs(config, path, tensor.shape, stored)
        # Two bytes for an element, or one and two halves for each group of 32.
        wide = 2 * count if precision == "float" else count + count // 8
        total += max(0, wide - (tensor.end - tensor.start))
    if unties and not any(name in stored for name in _HEAD):
        tables = [t.end - t.start for name, t in stored.items() if name.endswith(_TABLES)]
        total += max(tables, default=0)
    return total


def _writes(name: str) -> bool:
    return name.split(".")[-2] in WRITER_NAMES


def _inputs(
    config: Mapping[str, Any], path: str, shape: tuple[int, ...], stored: Mapping[str, Any]
) -> int:
    """The inputs of a matrix; of a packed one, whose rows hold 32 bits a word, by its format."""
    if f"{path}.scales" not in stored:
        return shape[-1]
    packing = config.get("quantization") or config.get("quantization_config") or {}
    special = packing.get(path)
    form = special if isinstance(special, dict) else packing
    return shape[-1] * 32 // int(form.get("bits") or 4)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
