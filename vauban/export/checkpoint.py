"""Write a complete checkpoint folder: edited tensors computed, all others copied as they are.

Knows mlx-lm's folder conventions and edit plans; judges nothing (`verify` does).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vauban import __version__
from vauban._arrays import flat_parameters
from vauban.edits import EditPlan, Rounding, Update, store_packed
from vauban.edits.heads import is_tied
from vauban.edits.streamed import edited_rows, float_dtype
from vauban.errors import InputError, ModelError
from vauban.export.along import norm, rows_along
from vauban.export.resume import Finished
from vauban.export.stacks import Stack, noted_origins, use_stacks
from vauban.export.tensors import (
    Entry,
    Late,
    Stored,
    computed,
    copied,
    given,
    pieces,
    stacked,
    stored_dtype,
    stored_tensors,
    to_bytes,
    write_safetensors,
)
from vauban.models import model_folder, unpacked_shape

_SHARD = 5 << 30
_KEPT = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".jsonl", ".py")
_DROPPED = ("model.safetensors.index.json", "README.md", "run.json", "answers.jsonl")


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint to edit: its stored tensors, and its parameters as mlx-lm names them (lazy).

    In the modules `stacks` stand in for the parameters of experts, which are read one by one.
    """

    folder: Path
    stored: dict[str, Stored]
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
        return pieces(self.take(name))

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
    with noted_origins() as origin:
        try:
            model, loaded = load_model(folder, lazy=True)
        except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
            raise ModelError(f"mlx-lm cannot load {model_path}: {error}") from error
    parameters, stored = flat_parameters(model), stored_tensors(folder)
    stacks = use_stacks(model, parameters, stored, origin)
    same_layout = all(
        name in stored
        and stored[name].shape == tuple(value.shape)
        and stored[name].dtype == stored_dtype(value.dtype)
        for name, value in parameters.items()
    )
    return Source(folder, stored, model, parameters, config, loaded, same_layout, stacks)


def untouched_entry(source: Source, name: str, copy: str | None = None) -> Entry:
    """A parameter as it is: raw bytes where the layouts agree, else mlx-lm's converted value.

    Converted values are released when they are written, except where what is written is only a
    `copy`, a second parameter of that name.
    """
    if source.same_layout:
        return copied(copy or name, source.stored[name])
    value = source.parameters[name]
    if name in source.stacks:
        shape, dtype = tuple(value.shape), stored_dtype(value.dtype)
        return Entry(copy or name, dtype, shape, source.stacks[name].chunks)
    read = source.parameters.__getitem__ if copy else source.take
    return computed(copy or name, tuple(value.shape), value.dtype, partial(read, name))


@dataclass(frozen=True, eq=False)
class Draft:
    """A checkpoint about to be written: tensors by name, edited modules by path.

    `outcomes` fills while the edited modules are computed: how each was stored, and what the
    rounding did. The configuration follows from it.
    """

    entries: dict[str, Entry]
    late: dict[str, Late]
    outcomes: dict[str, dict[str, Any]]
    untied_from: str | None = None


def draft_plan(source: Source, plan: EditPlan, precision: str | None, rounding: Rounding) -> Draft:
    """The edited checkpoint of `source`, nothing computed yet.

    InputError for a plan of another model.
    """
    plan.check_modules(source.model, str(source.folder))
    if plan.embedding == "untie" and not is_tied(source.model):
        raise InputError(
            f"the head of {source.folder} has its own matrix; this plan was made for a model whose "
            "head shares the embedding"
        )
    draft = Draft(
        {name: untouched_entry(source, name) for name in source.parameters},
        {},
        {},
        plan.updates[0].path if plan.embedding == "untie" else None,
    )
    for update in plan.updates:
        module = source.modules[update.path]
        packed = "scales" in module
        if not packed and not mx.issubdtype(module.weight.dtype, mx.floating):
            raise InputError(
                f"{update.path}.weight is {module.weight.dtype}; only floats and packed can be cut"
            )
        for part in ("weight", "scales", "biases"):
            name = f"{update.path}.{part}"
            if draft.entries.pop(name, None) and update.path == draft.untied_from:
                # The head keeps the matrix, in its own packing.
                head = f"lm_head.{part}"
                draft.entries[head] = untouched_entry(source, name, copy=head)
        make = partial(_edited, source, module, update, precision, rounding, draft.outcomes)
        draft.late[update.path] = Late(update.path, make, _likely(module, precision))
        if update.bias and "bias" in module:
            name, bias = f"{update.path}.bias", module.bias
            draft.entries[name] = computed(
                name, tuple(bias.shape), bias.dtype, partial(update.new_bias, bias)
            )
    return draft


def _likely(
    module: nn.Module, precision: str | None
) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """The arrays an edited module will most likely have: its own, or one float matrix."""
    if "scales" in module and precision != "float":
        parts = [part for part in ("weight", "scales", "biases") if module.get(part) is not None]
        return tuple((p, stored_dtype(module[p].dtype), tuple(module[p].shape)) for p in parts)
    shape = unpacked_shape(module)
    return (("weight", stored_dtype(float_dtype(module)), shape),)


def _edited(
    source: Source,
    module: nn.Module,
    update: Update,
    precision: str | None,
    rounding: Rounding,
    outcomes: dict[str, dict[str, Any]],
) -> Iterator[Entry]:
    """The tensors of one edited module; notes how it was stored."""
    stored = store_packed(module, update, precision, rounding)
    if stored is not None:
        outcomes[update.path] = stored.to_dict()
        for part, values in stored.parts.items():
            name = f"{update.path}.{part}"
            yield stacked(name, values) if stored.stacked else given(name, values[0])
        source.release(update.path)
        return
    had = norm(rows_along(module, update.basis, update.writes_rows))
    outcomes[update.path] = {"mode": "float", "was_packed": "scales" in module, "had": had}
    dtype = stored_dtype(float_dtype(module))
    shape = unpacked_shape(module)
    yield Entry(f"{update.path}.weight", dtype, shape, partial(_row_bytes, module, update))
    source.release(update.path)


def _row_bytes(module: nn.Module, update: Update) -> Iterator[bytes]:
    for rows in edited_rows(module, update):
        if not bool(mx.isfinite(rows).all()):
            raise InputError(f"{update.path}.weight becomes NaN or inf; nothing was written")
        yield to_bytes(rows)


def edited_config(source: Source, draft: Draft) -> dict[str, Any]:
    """The source's config.json with the formats of the edited modules, and the tie undone."""
    config = json.loads(json.dumps(source.config))
    packing = config.get("quantization") or source.loaded_config.get("quantization")
    own = packing.get(draft.untied_from) if packing else None
    for path, outcome in draft.outcomes.items():
        if outcome["mode"] != "float":
            facts = {k: outcome[k] for k in ("group_size", "bits", "mode")}
            if packing is None:
                # No module was packed: only those with an entry of their own will be.
                packing = {**facts}
            default = {k: packing.get(k, "affine") for k in ("group_size", "bits", "mode")}
            if facts != default or path in packing:
                packing[path] = facts
        elif outcome["was_packed"] and packing is not None:
            packing[path] = False
    if packing is not None and draft.untied_from and isinstance(own, dict):
        # The new head is packed as the embedding was, also where that had an entry of its own.
        packing["lm_head"] = own
    if packing is not None:
        config["quantization"] = config["quantization_config"] = packing
    if draft.untied_from:
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"]["tie_word_embeddings"] = False
    return config


def draft_weights(source: Source, weights: Mapping[str, mx.array]) -> Draft:
    """A flat dictionary of all weights, as `cut` returns it."""
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
    entries = {}
    for name, value in weights.items():
        expected = list(source.parameters[name].shape)
        path = name.rpartition(".")[0]
        if path in turned_float and name.endswith(".weight"):
            expected[-1] = expected[-1] * 32 // source.modules[path].bits
        if list(value.shape) != expected:
            raise InputError(f"{name} has shape {value.shape}; expected {tuple(expected)}")
        entries[name] = given(name, value)
    outcomes = {path: {"mode": "float", "was_packed": True} for path in turned_float}
    return Draft(entries, {}, outcomes)


def write_folder(source: Source, draft: Draft, folder: Path, key: str | None = None) -> None:
    """Write shards, index, config and the source's side files into `folder`.

    With `key` (see `resume`) shards that an earlier, killed run of the same export has finished
    are kept. The folder then holds a record of them: the caller calls `forget_record` when it has
    done its own work there.
    """
    metadata = {"format": "mlx", "vauban": __version__}
    shards = _shards(source, draft)
    finished = Finished(folder, key)
    for file, members in shards.items():
        noted = finished.outcomes(folder / file)
        if noted is None:
            write_safetensors(folder / file, members, metadata)
            paths = [m.path for m in members if isinstance(m, Late)]
            noted = {path: draft.outcomes[path] for path in paths}
            finished.note(folder / file, noted)
        draft.outcomes.update(noted)
    if len(shards) > 1 or (source.folder / "model.safetensors.index.json").is_file():
        written = stored_tensors(folder)
        total = sum(t.end - t.start for t in written.values())
        index = {name: t.file.name for name, t in sorted(written.items())}
        facts = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(facts, indent=2) + "\n")
    config = edited_config(source, draft)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    _copy_side_files(source.folder, folder)


def _shards(source: Source, draft: Draft) -> dict[str, list[Entry | Late]]:
    """Which tensor goes to which file: as in the source, or by size where the layout differs.

    There edited modules come last, when everything that is a copy of their arrays is written.
    """
    left: dict[str, Entry | Late] = {**draft.entries, **draft.late}
    if source.same_layout:
        shards: dict[str, list[Entry | Late]] = {}
        for name, stored in source.stored.items():
            members = shards.setdefault(stored.file.name, [])
            item = left.pop(name, None) or left.pop(name.rpartition(".")[0], None)
            if item is not None:
                members.append(item)
            elif name not in source.parameters:
                # Tensors that mlx-lm drops on loading stay in the file as they are.
                members.append(copied(name, stored))
        shards[max(shards)].extend(left.values())
        return shards
    groups: list[list[Entry | Late]] = [[]]
    size = 0
    for item in left.values():
        grows = item.nbytes if isinstance(item, Entry) else _nbytes(source, item)
        if groups[-1] and size + grows > _SHARD:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += grows
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    n = len(groups)
    return {f"model-{i:05d}-of-{n:05d}.safetensors": g for i, g in enumerate(groups, 1)}


def _nbytes(source: Source, late: Late) -> int:
    return int(source.parameters[f"{late.path}.weight"].nbytes)


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
        # Under its name it is complete: the next run would not copy it again.
        half = target.with_name(f"{target.name}.new")
        with path.open("rb") as reader, half.open("wb") as writer:
            shutil.copyfileobj(reader, writer)
            writer.flush()
            os.fsync(writer.fileno())
        half.replace(target)
