"""A checkpoint opened for editing: its tensors in their files, its parameters by mlx-lm's names.

No weight is read on opening. Knows folders and mlx-lm's loader; changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vauban._arrays import flat_parameters
from vauban.claims import translated
from vauban.errors import InputError, ModelError
from vauban.export.expert_stacks import Stack, use_stacks
from vauban.export.origins import Origin, parameter_origins
from vauban.export.tensor_files import TensorOnDisk, array_chunks, stored_dtype, stored_tensors
from vauban.models import model_folder, weight_files


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint to edit: its stored tensors, and its parameters as mlx-lm names them (lazy).

    In the modules `stacks` stand in for the parameters of experts, which are read one by one.
    """

    folder: Path
    stored: dict[str, TensorOnDisk]
    model: nn.Module
    parameters: dict[str, mx.array]
    config: dict[str, Any]
    loaded_config: dict[str, Any]
    same_layout: bool
    """Whether the file holds the parameters under the same names, shapes and types."""
    stacks: dict[str, Stack] = field(default_factory=dict)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The modules by path, as the checkpoint holds them."""
        return dict(self.model.named_modules())

    @cached_property
    def origins(self) -> dict[str, Origin]:
        """The stored tensors of each parameter that mlx-lm at most renames, stacks or turns.

        Told from names and shapes: to be asked for before a parameter is released.
        """
        if self.same_layout:
            return {name: Origin((name,)) for name in self.parameters}
        return parameter_origins(self.model, self.parameters, self.stored)

    def release(self, path: str) -> None:
        """Let go of a parameter, or of a module's: a lazy tensor that was read stays in memory.

        They cannot be read again; open the source anew for that.
        """
        if path in self.parameters:
            names = [path]
        else:
            names = [name for name in self.parameters if name.startswith(f"{path}.")]
        for name in names:
            holder, key = self._place(name)
            holder[key] = self.parameters[name] = mx.array(0.0)
        # On a GPU mlx keeps the memory for arrays of the same size.
        mx.clear_cache()

    def _place(self, name: str) -> tuple[Any, str | int]:
        """What holds a parameter (a module, or a list or dictionary in one), and its key there."""
        path, _, key = name.rpartition(".")
        if path in self.modules:
            return self.modules[path], key
        outer, place = self._place(path)
        holder = outer[place]
        return holder, int(key) if isinstance(holder, list) else key

    def chunks(self, name: str) -> Iterator[bytes]:
        """A parameter's bytes in pieces of at most 16 MB, released where it had to be computed.

        Raw where the layouts agree, else of mlx-lm's converted value.
        """
        if self.same_layout:
            return self.stored[name].chunks()
        if name in self.stacks:
            return self.stacks[name].chunks()
        return array_chunks(self.take(name))

    def take(self, name: str) -> mx.array:
        """A parameter, released: the caller's is the last reference."""
        value = self.parameters[name]
        self.release(name)
        return value


def source_folder(model_path: str | Path) -> Path:
    """The folder of the model to export; InputError for what is neither a path nor a Hub id."""
    if not isinstance(model_path, str | Path):
        raise InputError(
            f"the model to export is {model_path!r}; expected the folder or Hub id it came from"
        )
    return model_folder(model_path)


def open_source(model_path: str | Path) -> Source:
    """Open a folder or Hub id without reading its weights."""
    from mlx_lm.utils import load_model

    folder = source_folder(model_path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    told = translated(config)
    try:
        with weight_files(folder).loadable() as place:
            model, loaded = load_model(place, lazy=True, model_config=told)
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        raise ModelError(f"mlx-lm cannot load {model_path}: {error}") from error
    parameters, stored = flat_parameters(model), stored_tensors(folder)
    stacks = use_stacks(model, parameters, stored)
    same_layout = all(
        name in stored
        and stored[name].shape == tuple(value.shape)
        and stored[name].dtype == stored_dtype(value.dtype)
        for name, value in parameters.items()
    )
    # The written configuration keeps what the source says, and says it in mlx-lm's words too.
    config |= told
    return Source(folder, stored, model, parameters, config, loaded, same_layout, stacks)
