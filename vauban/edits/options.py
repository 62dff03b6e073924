"""What a caller says about how much is cut and where, checked once: numbers, blocks, factors.

Numbers of NumPy and mlx come out as Python's, so that a plan's settings are JSON. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from vauban.errors import InputError

# The edits compute in float32: a larger number would be infinite there.
_LARGEST = 3.4e38


def _scalar(value: Any) -> Any:
    """The Python value of a zero-dimensional array; anything else as it is."""
    if isinstance(value, mx.array | np.ndarray | np.generic) and value.ndim == 0:
        return value.item()
    return value


def finite(value: Any, name: str) -> float:
    """A Python float; InputError for what is no number, NaN, or too large for float32."""
    number = _scalar(value)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise InputError(f"{name} is {value!r}; expected a number")
    if not math.isfinite(number) or abs(number) > _LARGEST:
        raise InputError(f"{name} is {value!r}; expected a finite number")
    return float(number)


def whole(value: Any, name: str) -> int:
    """A Python int; InputError for text, bool and fractions."""
    number = _scalar(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise InputError(f"{name} is {value!r}; expected an int")
    return number


def block_set(layers: Any, existing: Collection[int], name: str) -> set[int]:
    """The blocks meant by "all", one int or several; `existing` are those there are.

    Raises InputError for none, for something else, and for a block that does not exist.
    """
    if isinstance(layers, str) and layers == "all":
        return set(existing)
    layers = _scalar(layers)
    if isinstance(layers, mx.array | np.ndarray):
        layers = layers.tolist()
    given = [layers] if isinstance(layers, int) else layers
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InputError(f"{name} is {layers!r}; expected 'all', an int or a list of ints")
    chosen = {whole(i, f"a block of {name}") for i in given}
    outside = sorted(chosen - set(existing))
    if outside or not chosen:
        wrong = f"block {outside[0]} does not exist" if outside else f"{name} is empty"
        raise InputError(f"{wrong}; there are blocks {min(existing)} to {max(existing)}")
    return chosen


def layer_factors(
    layer_weights: Any, chosen: Collection[int], name: str = "layer_weights"
) -> dict[int, float]:
    """{block: factor on α}, every block one that is cut.

    Raises InputError for a key that is no int (TOML and JSON have text as keys) or names a block
    that is not cut: such a factor would do nothing.
    """
    if layer_weights is None:
        return {}
    if not isinstance(layer_weights, Mapping):
        raise InputError(f"{name} is {layer_weights!r}; expected {{block: factor}}")
    factors = {
        whole(block, f"a key of {name}"): finite(factor, f"{name}[{block!r}]")
        for block, factor in layer_weights.items()
    }
    unused = sorted(set(factors) - set(chosen))
    if unused:
        raise InputError(
            f"{name} names {unused}, which are not cut; the blocks that are cut: {sorted(chosen)}"
        )
    return factors
