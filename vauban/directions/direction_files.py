"""Direction files: safetensors bytes with the JSON facts in the metadata, one format for all.

Inside a model's folder they end in `.vauban`: some programs load every `.safetensors` there, at any
depth, and refuse tensors that they do not know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from vauban._arrays import load_arrays, save_arrays
from vauban.errors import InputError

SUFFIXES = (".safetensors", ".vauban")


def direction_path(path: str | Path) -> Path:
    """Where a direction that is saved to `path` lies: it ends in `.vauban` or `.safetensors`.

    In a folder with a model's weights, or below it, always in `.vauban`; without a suffix of the
    two elsewhere in `.safetensors`.

    >>> direction_path("refusal").name, direction_path("refusal.vauban").name
    ('refusal.safetensors', 'refusal.vauban')
    """
    path = Path(path)
    inside = any(_holds_a_model(folder) for folder in path.absolute().parents)
    if path.suffix not in SUFFIXES:
        return path.with_name(path.name + (".vauban" if inside else ".safetensors"))
    return path.with_suffix(".vauban") if inside else path


def _holds_a_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))


def write(path: str | Path, kind: str, arrays: Mapping[str, mx.array], facts: Any) -> Path:
    """Write beside and rename, so that a killed run leaves no half file.

    Returns the path, see `direction_path`.
    """
    path = direction_path(path)
    save_arrays(path, arrays, {"format": kind, "result": json.dumps(facts, sort_keys=True)})
    return path


def read(
    path: str | Path, kind: str, names: Sequence[str]
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The arrays and facts that `write` stored; InputError names what a foreign file lacks.

    Where FILE.safetensors is missing, FILE.vauban is read.
    """
    path = Path(path)
    renamed = path.with_suffix(".vauban")
    if path.suffix == ".safetensors" and not path.exists() and renamed.is_file():
        path = renamed
    if not path.is_file():
        raise InputError(f"no direction file at {path}")
    try:
        arrays, metadata = load_arrays(path)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path} is no safetensors file: {error}") from error
    if metadata.get("format") != kind or set(names) - set(arrays):
        raise InputError(f"{path} is no direction file of vauban ({kind} expected)")
    for name in names:
        if not np.isfinite(np.array(arrays[name].astype(mx.float32))).all():
            raise InputError(f"{path}: {name} holds NaN or inf")
    return arrays, json.loads(metadata["result"])
