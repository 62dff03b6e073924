"""Write a complete checkpoint folder: edited tensors computed, all others copied as they are.

Knows mlx-lm's folder conventions and edit plans; judges nothing (`verify` does).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vauban import __version__
from vauban._arrays import flat_parameters
from vauban.edits import EditPlan, Update
from vauban.edits.lowrank import remove_from_bias
from vauban.edits.modules import module_weight
from vauban.errors import InputError, ModelError
from vauban.export.tensors import (
    Entry,
    Stored,
    computed,
    copied,
    stored_dtype,
    stored_tensors,
    write_safetensors,
)
from vauban.models import model_folder

_SHARD = 5 << 30
_KEPT = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".jsonl", ".py")
_DROPPED = ("model.safetensors.index.json", "README.md", "run.json", "answers.jsonl")
EDIT_FILE = "edit.safetensors"


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint to edit: its stored tensors, and its parameters as mlx-lm names them (lazy)."""

    folder: Path
    stored: dict[str, Stored]
    model: nn.Module
    parameters: dict[str, mx.array]
    config: dict[str, Any]
    loaded_config: dict[str, Any]

    @property
    def same_layout(self) -> bool:
        """Whether the file holds the parameters under the same names, shapes and types."""
        return all(
            name in self.stored
            and self.stored[name].shape == tuple(value.shape)
            and self.stored[name].dtype == stored_dtype(value.dtype)
            for name, value in self.parameters.items()
        )


def open_source(model_path: str | Path) -> Source:
    """Open a folder or Hub id without reading its weights."""
    from mlx_lm.utils import load_model

    folder = model_folder(model_path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        model, loaded = load_model(folder, lazy=True)
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        raise ModelError(f"mlx-lm cannot load {model_path}: {error}") from error
    parameters = flat_parameters(model)
    return Source(folder, stored_tensors(folder), model, parameters, config, loaded)


def untouched_entry(source: Source, name: str) -> Entry:
    """A parameter as it is: raw bytes where the layouts agree, else mlx-lm's converted value."""
    if source.same_layout:
        return copied(name, source.stored[name])
    value = source.parameters[name]
    return computed(name, tuple(value.shape), value.dtype, lambda: value)


def plan_entries(source: Source, plan: EditPlan) -> tuple[dict[str, Entry], dict[str, Any]]:
    """All tensors of the edited checkpoint by name, and its configuration."""
    modules = dict(source.model.named_modules())
    entries = {name: untouched_entry(source, name) for name in source.parameters}
    turned_float = []
    for update in plan.updates:
        if update.path not in modules:
            raise InputError(
                f"{source.folder} has no module {update.path}; this plan was made for another model"
            )
        module = modules[update.path]
        if plan.embedding == "untie" and update.is_embedding:
            for part in ("weight", "scales", "biases"):
                if part in module:
                    old = entries[f"{update.path}.{part}"]
                    entries[f"lm_head.{part}"] = Entry(
                        f"lm_head.{part}", old.dtype, old.shape, old.chunks
                    )
        if "scales" in module:
            turned_float.append(update.path)
        for entry in _edited(module, update):
            entries[entry.name] = entry
        if "scales" in module:
            for part in ("scales", "biases"):
                entries.pop(f"{update.path}.{part}", None)
    config = edited_config(source, turned_float, untied=plan.embedding == "untie")
    if plan.embedding == "untie":
        _copy_packing(config, plan.updates[0].path, source)
    return entries, config


def _edited(module: nn.Module, update: Update) -> list[Entry]:
    packed = "scales" in module
    dtype = module.weight.dtype
    if packed:
        dtype = module.scales.dtype if module.get("biases") is not None else mx.bfloat16
    shape = list(module.weight.shape)
    if packed:
        shape[-1] = shape[-1] * 32 // module.bits
    if not packed and not mx.issubdtype(dtype, mx.floating):
        raise InputError(
            f"{update.path}.weight is {dtype}; only float and packed weights can be cut"
        )
    found = [
        computed(
            f"{update.path}.weight",
            tuple(shape),
            dtype,
            lambda: update.weight(module_weight(module)).astype(dtype),
        )
    ]
    if update.bias and "bias" in module:
        bias = module.bias
        found.append(
            computed(
                f"{update.path}.bias",
                tuple(bias.shape),
                bias.dtype,
                lambda: remove_from_bias(bias, update.basis, update.alpha).astype(bias.dtype),
            )
        )
    return found


def _itself(value: mx.array) -> mx.array:
    return value


def edited_config(source: Source, turned_float: list[str], *, untied: bool) -> dict[str, Any]:
    """The source's config.json with the modules that became float, and the tie undone."""
    config = json.loads(json.dumps(source.config))
    packing = config.get("quantization") or source.loaded_config.get("quantization")
    if packing is not None:
        packing = json.loads(json.dumps(packing))
        for path in turned_float:
            packing[path] = False
        config["quantization"] = packing
        config["quantization_config"] = packing
    if untied:
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"]["tie_word_embeddings"] = False
    return config


def _copy_packing(config: dict[str, Any], embedding: str, source: Source) -> None:
    """The new head is packed as the embedding was, also where that had an entry of its own."""
    own = (source.config.get("quantization") or {}).get(embedding)
    if isinstance(own, dict):
        config["quantization"]["lm_head"] = own


def weight_entries(
    source: Source, weights: Mapping[str, mx.array]
) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Tensors and configuration for a flat dictionary of all weights, as `cut` returns it."""
    packed = {n.removesuffix(".scales") for n in source.parameters if n.endswith(".scales")}
    turned_float = sorted(p for p in packed if f"{p}.scales" not in weights)
    dropped = {f"{p}.{part}" for p in turned_float for part in ("scales", "biases")}
    missing = sorted(set(source.parameters) - set(weights) - dropped)
    unknown = sorted(set(weights) - set(source.parameters))
    if missing or unknown:
        what = f"lack {missing[0]}" if missing else f"hold {unknown[0]}, which the model does not"
        raise InputError(
            f"the weights {what}; expected every parameter of {source.folder.name} "
            "(dict(tree_flatten(model.parameters())))"
        )
    modules = dict(source.model.named_modules())
    entries = {}
    for name, value in weights.items():
        expected = list(source.parameters[name].shape)
        path = name.rpartition(".")[0]
        if path in turned_float and name.endswith(".weight"):
            expected[-1] = expected[-1] * 32 // modules[path].bits
        if list(value.shape) != expected:
            raise InputError(f"{name} has shape {value.shape}; expected {tuple(expected)}")
        entries[name] = computed(name, tuple(value.shape), value.dtype, partial(_itself, value))
    return entries, edited_config(source, turned_float, untied=False)


def write_folder(
    source: Source, entries: dict[str, Entry], config: dict[str, Any], folder: Path
) -> dict[str, str]:
    """Write shards, index, config and the source's side files into `folder`: {file: sha256}."""
    shards = _shards(source, entries)
    metadata = {"format": "mlx", "vauban": __version__}
    hashes, index = {}, {}
    for file, members in shards.items():
        hashes[file] = write_safetensors(folder / file, members, metadata)
        index.update({entry.name: file for entry in members})
    if len(shards) > 1 or (source.folder / "model.safetensors.index.json").is_file():
        total = sum(entry.nbytes for entry in entries.values())
        facts = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(facts, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    _copy_side_files(source.folder, folder)
    return hashes


def _shards(source: Source, entries: dict[str, Entry]) -> dict[str, list[Entry]]:
    """Which tensor goes to which file: as in the source, or by size where the layout differs."""
    if source.same_layout:
        shards: dict[str, list[Entry]] = {}
        last = ""
        for name, stored in source.stored.items():
            last = stored.file.name
            if name in entries:
                shards.setdefault(last, []).append(entries[name])
            elif name not in source.parameters:
                # Tensors that mlx-lm drops on loading stay in the file as they are.
                shards.setdefault(last, []).append(copied(name, stored))
        new = [entry for name, entry in entries.items() if name not in source.stored]
        if new:
            shards.setdefault(last, []).extend(new)
        return shards
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries.values():
        if groups[-1] and size + entry.nbytes > _SHARD:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    n = len(groups)
    return {f"model-{i:05d}-of-{n:05d}.safetensors": g for i, g in enumerate(groups, 1)}


def _copy_side_files(source: Path, folder: Path) -> None:
    """Tokenizer, template and prompt files; weights of other formats are left behind."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or not path.is_file() or path.suffix not in _KEPT or relative.name in _DROPPED:
            continue
        target = folder / relative
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def write_edit_record(plan: EditPlan, source: Source, folder: Path) -> None:
    """`edit.safetensors`: each writer's removed basis, how much of it there was, the settings.

    `verify_export` reads it to say what is left without the plan or the source.
    """
    modules = dict(source.model.named_modules())
    arrays, before = {"basis": plan.basis}, {}
    for update in plan.updates:
        weight = module_weight(modules[update.path]).astype(mx.float32)
        matrix = weight.T if update.writes_rows else weight
        before[update.path] = float(mx.linalg.norm(update.basis @ matrix))
        arrays[f"basis.{update.path}"] = update.basis
    facts = {**plan.to_dict(), "before": before}
    metadata = {"format": "vauban.edit/1", "plan": json.dumps(facts, sort_keys=True)}
    mx.save_safetensors(str(folder / EDIT_FILE), arrays, metadata)
