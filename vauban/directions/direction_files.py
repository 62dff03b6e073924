"""Direction files: safetensors with the JSON facts in the metadata. Knows one format for all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from vauban._arrays import load_arrays
from vauban.errors import InputError


def write(path: str | Path, kind: str, arrays: Mapping[str, mx.array], facts: Any) -> Path:
    """Write beside and rename, so that a killed run leaves no half file; returns the path."""
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path.with_name(path.name + ".safetensors")
    partial = path.with_name(f".{path.stem}.partial.safetensors")
    metadata = {"format": kind, "result": json.dumps(facts, sort_keys=True)}
    mx.save_safetensors(str(partial), dict(arrays), metadata)
    partial.replace(path)
    return path


def read(
    path: str | Path, kind: str, names: Sequence[str]
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The arrays and facts that `write` stored; InputError names what a foreign file lacks."""
    path = Path(path)
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
