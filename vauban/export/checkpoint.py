"""Write a complete checkpoint folder: edited tensors computed, all others copied as they are.

Knows mlx-lm's folder conventions and edit plans; judges nothing (`verify` does).
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vauban import __version__
from vauban._common import Progress
from vauban.edits.blocks import edited_rows, float_dtype
from vauban.edits.embedding import is_tied
from vauban.edits.modules import affine_group
from vauban.edits.packed import store_packed
from vauban.edits.plan import EditPlan
from vauban.edits.update import Update
from vauban.errors import InputError
from vauban.export.calibrate import inputs_of
from vauban.export.interrupted import Finished
from vauban.export.layout import Placement, place
from vauban.export.read_back import norm, rows_along
from vauban.export.side_files import beside_index, copy_side_files
from vauban.export.source import Source
from vauban.export.tensor_files import (
    Entry,
    LateTensors,
    array_entry,
    computed_entry,
    copied_entry,
    stacked_entry,
    stored_dtype,
    stored_tensors,
    to_bytes,
    write_safetensors,
)
from vauban.models import check_safetensors, unpacked_shape
from vauban.models.weight_files import INDEX
from vauban.rounding import Energy

_FORMAT = ("group_size", "bits", "mode")


def untouched_entry(source: Source, name: str, renamed: str | None = None) -> Entry:
    """A parameter as it is: raw bytes where the layouts agree, else mlx-lm's converted value.

    `renamed` writes it a second time, under another name. A converted value is released when it is
    written, but for that second time.
    """
    if source.same_layout:
        return copied_entry(renamed or name, source.stored[name])
    value = source.parameters[name]
    if name in source.stacks:
        shape, dtype = tuple(value.shape), stored_dtype(value.dtype)
        return Entry(renamed or name, dtype, shape, source.stacks[name].chunks)
    read = source.parameters.__getitem__ if renamed else source.take
    return computed_entry(renamed or name, tuple(value.shape), value.dtype, partial(read, name))


@dataclass(frozen=True, eq=False)
class Draft:
    """A checkpoint about to be written: tensors by name, edited modules by path.

    `outcomes` fills while the edited modules are computed: how each was stored, and what the
    rounding did. The configuration follows from it.
    """

    entries: dict[str, Entry]
    edited: dict[str, LateTensors]
    outcomes: dict[str, dict[str, Any]]
    untied_from: str | None = None
    changed: set[str] = field(default_factory=set)
    """The names in `entries` whose bytes are not the source's."""


def draft_plan(
    source: Source, plan: EditPlan, precision: str | None, progress: Progress | None = None
) -> Draft:
    """The edited checkpoint of `source`, nothing computed yet.

    `progress` is told of each edited module when it is computed, while the folder is written.

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
    inputs = inputs_of(plan)
    written = itertools.count(1)
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
                draft.entries[head] = untouched_entry(source, name, renamed=head)
                draft.changed.add(head)
        energies = inputs.get(update.path, ())
        make = partial(_edited, source, module, update, energies, precision, draft.outcomes)
        if progress is not None:
            make = partial(_told, make, lambda: progress("write", next(written), len(plan.updates)))
        draft.edited[update.path] = LateTensors(
            update.path, make, _expected_arrays(module, precision)
        )
        if update.bias and "bias" in module:
            name, bias = f"{update.path}.bias", module.bias
            draft.entries[name] = computed_entry(
                name, tuple(bias.shape), bias.dtype, partial(update.new_bias, bias)
            )
            draft.changed.add(name)
    return draft


def _expected_arrays(
    module: nn.Module, precision: str | None
) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """The arrays an edited module will most likely have: its own, or one float matrix."""
    packed = "scales" in module
    shape = unpacked_shape(module)
    group = affine_group(module) if precision == "8bit" else None
    if group and not packed:
        scales = (*shape[:-1], shape[-1] // group)
        kind = stored_dtype(float_dtype(module))
        weight = ("weight", "U32", (*shape[:-1], shape[-1] // 4))
        return weight, ("scales", kind, scales), ("biases", kind, scales)
    if packed and precision != "float":
        parts = [part for part in ("weight", "scales", "biases") if module.get(part) is not None]
        return tuple((p, stored_dtype(module[p].dtype), tuple(module[p].shape)) for p in parts)
    return (("weight", stored_dtype(float_dtype(module)), shape),)


def _edited(
    source: Source,
    module: nn.Module,
    update: Update,
    energies: Sequence[Energy | None],
    precision: str | None,
    outcomes: dict[str, dict[str, Any]],
) -> Iterator[Entry]:
    """The tensors of one edited module; notes how it was stored."""
    stored = store_packed(module, update, precision, energies)
    if stored is not None:
        outcomes[update.path] = stored.to_dict()
        for part, values in stored.parts.items():
            name = f"{update.path}.{part}"
            yield stacked_entry(name, values) if stored.stacked else array_entry(name, values[0])
        source.release(update.path)
        return
    had = norm(rows_along(module, update.basis, update.writes_rows))
    outcomes[update.path] = {"mode": "float", "was_packed": "scales" in module, "had": had}
    dtype = stored_dtype(float_dtype(module))
    shape = unpacked_shape(module)
    yield Entry(f"{update.path}.weight", dtype, shape, partial(_row_bytes, module, update))
    source.release(update.path)


def _told(make: Callable[[], Iterator[Entry]], tell: Callable[[], None]) -> Iterator[Entry]:
    """The entries of a module, and a word when all of them are written."""
    yield from make()
    tell()


def _row_bytes(module: nn.Module, update: Update) -> Iterator[bytes]:
    for rows in edited_rows(module, update):
        yield to_bytes(rows)


def edited_config(source: Source, draft: Draft) -> dict[str, Any]:
    """The source's config.json with the formats of the edited modules, and the tie undone."""
    config = copy.deepcopy(source.config)
    packing = _packing(source, draft)
    if packing:
        config["quantization"] = config["quantization_config"] = packing
    if draft.untied_from:
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"]["tie_word_embeddings"] = False
    return config


def _packing(source: Source, draft: Draft) -> dict[str, Any]:
    """mlx-lm's `quantization`: a default format, and by path another one or False (floats)."""
    before = source.config.get("quantization") or source.loaded_config.get("quantization") or {}
    packing = copy.deepcopy(before)
    for path, outcome in draft.outcomes.items():
        if outcome["mode"] == "float":
            if outcome["was_packed"] and packing:
                packing[path] = False
            continue
        form = {key: outcome[key] for key in _FORMAT}
        # Where no module was packed the first one gives the default, which mlx-lm asks for.
        default = {"mode": "affine", **(packing or form)}
        packing = packing or dict(form)
        if path in packing or form != {key: default[key] for key in _FORMAT}:
            packing[path] = form
    if draft.untied_from and isinstance(before.get(draft.untied_from), dict):
        # The head holds the embedding's old matrix, in the format of its own that this had.
        packing["lm_head"] = before[draft.untied_from]
    return packing


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
        entries[name] = array_entry(name, value)
    outcomes = {path: {"mode": "float", "was_packed": True} for path in turned_float}
    if not source.same_layout:
        # Told from shapes, which are gone once a parameter is released.
        _ = source.origins
    changed = {name for name in entries if source.same_layout or _differs(source, name, weights)}
    return Draft(entries, {}, outcomes, changed=changed)


def _differs(source: Source, name: str, weights: Mapping[str, mx.array]) -> bool:
    """Whether a parameter is another than the source's, which is released."""
    given = weights[name]
    value = source.stacks[name].array() if name in source.stacks else source.parameters[name]
    same = value.dtype == given.dtype and bool(mx.array_equal(value, given))
    source.release(name)
    return not same


def write_folder(
    source: Source, draft: Draft, folder: Path, key: str | None = None, layout: str = "same"
) -> Placement:
    """Write shards, index, config and the source's side files into `folder`.

    With `key` (see `resume_key`) shards that an earlier, killed run of the same export has finished
    are kept. The folder then holds a record of them: the caller calls `forget_record` when it has
    done its own work there. `layout` as for `place`; the result says which one it became.
    """
    placement = place(source, draft.entries, draft.edited, draft.changed, layout)
    metadata = {"format": _format_of(source, placement.layout), "vauban": __version__}
    finished = Finished(folder, key)
    for file, members in placement.shards.items():
        noted = finished.outcomes(folder / file)
        if noted is None:
            write_safetensors(folder / file, members, metadata)
            paths = [m.path for m in members if isinstance(m, LateTensors)]
            noted = {path: draft.outcomes[path] for path in paths}
            finished.note(folder / file, noted)
        draft.outcomes.update(noted)
    copy_side_files(source.folder, folder)
    _write_index(source, folder, len(placement.shards))
    config = edited_config(source, draft)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return placement


def _format_of(source: Source, layout: str) -> str:
    """What the files say of their names: as in the source, "mlx", or "pt" for those of PyTorch."""
    if layout != "same":
        return "mlx" if layout == "mlx" else "pt"
    header = check_safetensors(next(iter(source.stored.values())).file)
    given = header.get("__metadata__", {}).get("format")
    return str(given or ("mlx" if source.same_layout else "pt"))


def _write_index(source: Source, folder: Path, shards: int) -> None:
    """The index of what was written, and of the files that only the source's index names."""
    beside = beside_index(source.folder)
    if shards == 1 and not beside and not (source.folder / INDEX).is_file():
        return
    written = stored_tensors(folder)
    total = sum(t.end - t.start for t in written.values())
    for file in sorted(set(beside.values())):
        header = check_safetensors(folder / file)
        ends = [t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"]
        total += max(ends, default=0)
    index = {name: t.file.name for name, t in written.items()} | beside
    facts = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    (folder / INDEX).write_text(json.dumps(facts, indent=2) + "\n")
