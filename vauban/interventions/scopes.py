"""Which blocks or residuals an intervention touches. Knows indices only."""

from __future__ import annotations

from typing import Any

from vauban.errors import InputError


def layer_set(layers: Any, name: str) -> frozenset[int] | None:
    """The named indices without repetition; None stands for "all".

    Raises InputError for an empty set, a negative index or a word other than "all".
    """
    if isinstance(layers, str):
        if layers == "all":
            return None
        raise InputError(f"{name}: layers is {layers!r}; expected 'all', an int or a list of ints")
    if isinstance(layers, int):
        layers = [layers]
    chosen = frozenset(int(i) for i in layers)
    if not chosen:
        raise InputError(f"{name}: layers is empty; name at least one block or 'all'")
    if min(chosen) < 0:
        raise InputError(f"{name}: layer {min(chosen)} is negative; blocks count from 0")
    return chosen


def check_blocks(chosen: frozenset[int] | None, n_layers: int, name: str) -> None:
    """InputError when a named block lies beyond the model."""
    if chosen is not None and max(chosen) >= n_layers:
        raise InputError(
            f"{name}: layer {max(chosen)} does not exist; the model has blocks 0 to {n_layers - 1}"
        )


def check_residuals(chosen: frozenset[int] | None, n_layers: int, name: str) -> None:
    """InputError when a named residual lies beyond the output of the last block."""
    if chosen is not None and max(chosen) > n_layers:
        raise InputError(
            f"{name}: residual {max(chosen)} does not exist; the model has 0 to {n_layers}"
        )
