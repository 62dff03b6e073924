"""What an mlx-lm adapter adds to its model's matrices, by blocks of rows: LoRA, DoRA and full.

Knows mlx-lm's adapter folders and a base's stored parameters; opens no model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vauban._arrays import as_numpy, load_arrays
from vauban.comparison.folder_settings import read_json
from vauban.comparison.stored_parameters import StoredParameter
from vauban.errors import InputError
from vauban.export.adapter import CONFIG, WEIGHTS
from vauban.models import check_safetensors


@dataclass(frozen=True, eq=False)
class AddedTerm:
    """scale · L R on a parameter (L (m, r), R (r, n), one pair per matrix of a stack).

    With `magnitude` (m,) the sum's rows are scaled to that length: DoRA.
    """

    name: str
    left: np.ndarray
    right: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None

    @property
    def format(self) -> str:
        kind = "LoRA" if self.magnitude is None else "DoRA"
        return f"{kind} of rank {self.left.shape[-1]}"

    def added(self, start: int, stop: int, before: np.ndarray) -> np.ndarray:
        """What is added to some rows, which are `before` in the base."""
        size = self.left.shape[-2]
        matrix, first = divmod(start, size)
        left = self.left.reshape(-1, *self.left.shape[-2:])[matrix][first : first + stop - start]
        right = self.right.reshape(-1, *self.right.shape[-2:])[matrix]
        product = (self.scale * left) @ right
        if self.magnitude is None:
            return product
        together = before + product
        lengths = np.linalg.norm(together, axis=1, keepdims=True)
        return together * (self.magnitude[start:stop, None] / lengths) - before


@dataclass(frozen=True, eq=False)
class FullValue:
    """A parameter that an adapter of type "full" replaces."""

    name: str
    values: np.ndarray = field(repr=False)
    format: str = "full"

    def added(self, start: int, stop: int, before: np.ndarray) -> np.ndarray:
        return self.values.reshape(-1, self.values.shape[-1])[start:stop] - before


def adapter_terms(
    folder: Path, base: dict[str, StoredParameter]
) -> dict[str, AddedTerm | FullValue]:
    """What an adapter folder changes, by the base's parameter names.

    Raises InputError for an adapter of another library, files that are missing or truncated, and
    factors that fit no parameter of the base.
    """
    config = read_json(folder / CONFIG)
    file = folder / WEIGHTS
    if not file.is_file():
        raise InputError(
            f"{folder} has no {WEIGHTS}; expected an adapter as mlx-lm writes it"
            + (" (this one is PEFT's: fuse it into its model first)" if "peft_type" in config
               else "")
        )  # fmt: skip
    check_safetensors(file)
    arrays = {name: as_numpy(value) for name, value in load_arrays(file)[0].items()}
    kind = config.get("fine_tune_type", "lora")
    if kind == "full":
        return {name: _full(folder, base, name, value) for name, value in arrays.items()}
    scale = (config.get("lora_parameters") or {}).get("scale")
    if not isinstance(scale, int | float):
        raise InputError(
            f"{folder / CONFIG}: lora_parameters.scale is {scale!r}; expected a number"
        )
    paths = sorted({n.removesuffix(".lora_a") for n in arrays if n.endswith(".lora_a")})
    if not paths:
        raise InputError(f"{file} holds no lora_a; expected an adapter of type lora, dora or full")
    return {f"{p}.weight": _term(folder, base, p, arrays, float(scale)) for p in paths}


def _full(
    folder: Path, base: dict[str, StoredParameter], name: str, value: np.ndarray
) -> FullValue:
    if name not in base or base[name].shape != value.shape:
        raise InputError(
            f"{folder}: the adapter replaces {name} {value.shape}; the base has "
            f"{base[name].shape if name in base else 'no such parameter'}"
        )
    return FullValue(name, np.atleast_1d(value))


def _term(
    folder: Path, base: dict[str, StoredParameter], path: str, arrays: dict[str, Any], scale: float
) -> AddedTerm:
    a, b = arrays[f"{path}.lora_a"], arrays.get(f"{path}.lora_b")
    name = f"{path}.weight"
    if name not in base:
        raise InputError(f"{folder}: the adapter changes {path}, which the base does not have")
    shape = base[name].shape
    if b is None:
        raise InputError(f"{folder}: {path} has lora_a without lora_b")
    magnitude = arrays.get(f"{path}.m")
    if a.ndim == 3 and (b.shape[-2], a.shape[-1]) == shape[-2:] and len(a) == len(b) == shape[0]:
        return AddedTerm(name, b, a, scale)
    if a.ndim == 2 and (b.shape[1], a.shape[0]) == shape:
        return AddedTerm(name, b.T, a.T, scale, magnitude)
    if a.ndim == 2 and (a.shape[0], b.shape[1]) == shape:  # An embedding's.
        return AddedTerm(name, a, b, scale, magnitude)
    raise InputError(
        f"{folder}: {path} has lora_a {a.shape} and lora_b {b.shape}, which do not fit the base's "
        f"matrix {shape}"
    )
