"""Typed crossings between mlx and Python: parameter dictionaries, lists of floats, arrays on disk.

Knows arrays and module trees; nothing of language models.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten


def flat_parameters(model: nn.Module) -> dict[str, mx.array]:
    """Every parameter by its dotted name."""
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())))


def floats(values: mx.array) -> list[float]:
    """A one-dimensional array as Python floats."""
    return [float(v) for v in cast(list[float], values.reshape(-1).tolist())]


def integers(values: mx.array) -> list[int]:
    """A one-dimensional array as Python ints."""
    return [int(v) for v in cast(list[int], values.reshape(-1).tolist())]


def as_numpy(values: mx.array) -> np.ndarray:
    """In NumPy, floats as float32 (it has no bfloat16), bytes as they are."""
    return np.array(values if values.dtype == mx.uint8 else values.astype(mx.float32))


def unpack(
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    group_size: int,
    bits: int,
    mode: str,
) -> mx.array:
    """Dequantize in float32: the kernel rounds to the scales' dtype, so they are upcast first."""
    if biases is not None:
        return mx.dequantize(
            weight, scales.astype(mx.float32), biases.astype(mx.float32), group_size, bits
        )
    return mx.dequantize(weight, scales, None, group_size, bits, mode=mode, dtype=mx.float32)


def save_arrays(path: Path, arrays: Mapping[str, mx.array], metadata: dict[str, str]) -> None:
    """Write safetensors bytes under any name, as a whole or not at all.

    Until it is complete the file bears a hidden name that no program takes for weights: mlx would
    append `.safetensors` to a path, and many open every such file in a model's folder.
    """
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("wb") as stream:
        mx.save_safetensors(cast(Any, stream), dict(arrays), metadata)
    draft.replace(path)


def load_arrays(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The arrays and the metadata of safetensors bytes under any name."""
    arrays, metadata = cast(Any, mx.load(str(path), format="safetensors", return_metadata=True))
    return arrays, metadata
