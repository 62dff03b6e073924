"""Whether a folder stores the weights that a plan was made on.

An export reads the folder again, so whatever was changed in memory alone (an adapter, weights fused
or edited by hand) would be missing from what is written. Rows of every parameter are compared.
Reads files and models; writes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban._arrays import flat_parameters, unpack
from vauban.edits.embedding import is_tied
from vauban.edits.plan import EditPlan
from vauban.errors import InputError
from vauban.export.interrupted import digest_of
from vauban.export.source import Source, open_source
from vauban.export.tensor_files import TensorOnDisk, stored_dtype
from vauban.models import folder_of
from vauban.models.notes import notes

# Elements of a parameter that are compared, in whole rows spread over it, and the fewest rows.
_ELEMENTS, _ROWS = 1 << 19, 32
# Of one model in two packings the matrices are this near; those of two models are 1.4 apart.
_ANOTHER_PACKING = 0.5
_PACKED = ("weight", "scales", "biases")
_FUSE = (
    "fuse an adapter into a folder first (python -m mlx_lm.fuse --model BASE --adapter-path "
    "ADAPTER --save-path FUSED), then load that folder, plan on it and export from it"
)


def check_plan_matches(plan: EditPlan, model_path: str | Path) -> None:
    """InputError where the plan's model holds other weights than the folder that is to be edited.

    A model on which this very plan was applied in memory matches, as does one that was measured in
    another packing or float type than the folder stores.
    """
    source = open_source(model_path)
    plan.check_modules(source.model, str(source.folder))
    if plan.embedding == "untie" and not is_tied(source.model):
        # Another model, which `draft_plan` refuses by that.
        return
    edited = notes(plan.model).edited
    applied = {u.path for u in plan.updates if edited.get(u.path) == digest_of(u)}
    if plan.embedding == "untie" and applied:
        applied.add("lm_head")
    check_model_matches(plan.model, source, applied)


def check_model_matches(model: nn.Module, source: Source, except_for: Collection[str] = ()) -> None:
    """InputError naming the modules in which `model` is not what `source` stores.

    `except_for`: paths of modules that are known to differ.
    """
    adapters = _adapters(model)
    wrong = sorted(path for path, inert in adapters.items() if not inert)
    if wrong:
        raise InputError(
            f"the model in memory carries an adapter on {_listed(wrong)}, which {source.folder} "
            f"does not store: the export would be written without it; {_FUSE}"
        )
    held = _Parameters(model, adapters)
    skipped = {p for p in {*held.modules, *_paths(source.parameters)} if p in except_for}
    apart = []
    only = {n for n in held.arrays.keys() ^ source.parameters.keys() if _counts(n, held, source)}
    for name in sorted(only):
        if name.rpartition(".")[0] not in skipped:
            apart.append(name.rpartition(".")[0])
    exact = folder_of(model) is not None and _same_folder(folder_of(model), source.folder)
    converted: list[str] = []
    for path in sorted(held.modules):
        if path in skipped or path in apart:
            continue
        if not held.compare(path, source, exact=exact):
            converted.append(path)
    if converted:
        # As mlx-lm converts them; what a conversion alone has changed is no difference.
        fresh = open_source(source.folder)
        for path in converted:
            if not held.compare(path, fresh, exact=exact, converted=True):
                apart.append(path)
            # Of a module that holds others, too, its own parameters alone.
            for name in [n for n in fresh.parameters if n.rpartition(".")[0] == path]:
                fresh.release(name)
    if apart:
        names = sorted(set(apart))
        raise InputError(
            f"the model in memory is not what {source.folder} stores: {len(names)} modules differ "
            f"({_listed(names)}), and the export would be written without what was changed there; "
            f"give the folder that the model was loaded from, or {_FUSE}"
        )


class _Parameters:
    """A model's parameters under the names that they have without inert adapters."""

    def __init__(self, model: nn.Module, adapters: Mapping[str, bool]) -> None:
        self.model = dict(model.named_modules())
        self.arrays: dict[str, mx.array] = {}
        self.places: dict[str, nn.Module] = {}
        for name, value in flat_parameters(model).items():
            path, _, key = name.rpartition(".")
            if path in adapters:
                continue
            outer, _, last = path.rpartition(".")
            plain = outer if outer in adapters and last in ("linear", "embedding") else path
            self.arrays[f"{plain}.{key}" if plain else key] = value
            if path in self.model:
                self.places[plain] = self.model[path]
        self.modules = _paths(self.arrays)

    def compare(
        self, path: str, source: Source, *, exact: bool, converted: bool = False
    ) -> bool | None:
        """Whether a module's parameters are the source's; None where the file does not show it."""
        mine = {n: v for n, v in self.arrays.items() if n.rpartition(".")[0] == path}
        theirs = {n: v for n, v in source.parameters.items() if n.rpartition(".")[0] == path}
        packed = (f"{path}.scales" in mine, f"{path}.scales" in theirs)
        if any(packed) and (packed != (True, True) or not self._alike(path, source)):
            names = [n for n in mine.keys() & theirs.keys() if n.rpartition(".")[2] not in _PACKED]
            apart = self._repacked(path, source, exact=exact and packed[1], converted=converted)
            if not apart:
                return apart
        else:
            names = [*mine.keys() & theirs.keys()]
        answers = [_same(mine[name], source, name, converted) for name in names]
        if False in answers:
            return False
        return None if None in answers else True

    def _alike(self, path: str, source: Source) -> bool:
        """Whether both are packed in one format."""
        a, b = self.places[path], source.modules[path]
        return all(
            getattr(a, fact, None) == getattr(b, fact, None)
            for fact in ("bits", "group_size", "mode")
        )

    def _repacked(self, path: str, source: Source, *, exact: bool, converted: bool) -> bool | None:
        """Whether the matrices agree as far as two packings of one model do."""
        module = self.places[path]
        parts = {part: module.get(part) for part in _PACKED}
        theirs = {
            part: _stored_rows(source, f"{path}.{part}", None, converted)
            for part in _PACKED
            if f"{path}.{part}" in source.parameters
        }
        if any(value is None for value in theirs.values()):
            return None
        weight = parts["weight"]
        assert weight is not None
        count = int(np.prod(weight.shape[:-1]))
        rows = _spread(count, module.weight.shape[-1] * 4)
        a = _floats(parts, rows, module)
        b = _floats(theirs, rows, source.modules[path])
        if a.shape != b.shape:
            return False
        size = max(float(mx.linalg.norm(b)), 1e-30)
        return float(mx.linalg.norm(a - b)) / size <= (1e-2 if exact else _ANOTHER_PACKING)


def _floats(parts: Mapping[str, mx.array | None], rows: np.ndarray, module: nn.Module) -> mx.array:
    """Rows of a matrix, unpacked where it is packed."""
    taken = {
        part: None if value is None else value.reshape(-1, value.shape[-1])[mx.array(rows)]
        for part, value in parts.items()
    }
    weight, scales = taken["weight"], taken.get("scales")
    assert weight is not None
    if scales is None:
        return weight.astype(mx.float32)
    mode = getattr(module, "mode", "affine")
    return unpack(weight, scales, taken.get("biases"), module.group_size, module.bits, mode)


def _same(value: mx.array, source: Source, name: str, converted: bool) -> bool | None:
    """Whether sampled rows are equal, or one is the other's rounding; None where unread."""
    if tuple(value.shape) != tuple(source.parameters[name].shape):
        return False
    mine = value.reshape(-1, value.shape[-1]) if value.ndim else value.reshape(1, 1)
    rows = _spread(mine.shape[0], mine.shape[1])
    theirs = _stored_rows(source, name, rows, converted)
    if theirs is None:
        return None
    mine = mine[mx.array(rows)]
    if mine.dtype == theirs.dtype or not mx.issubdtype(mine.dtype, mx.floating):
        return bool(mx.array_equal(mine, theirs, equal_nan=True))
    return bool(mx.array_equal(mine, theirs.astype(mine.dtype), equal_nan=True)) or bool(
        mx.array_equal(mine.astype(theirs.dtype), theirs, equal_nan=True)
    )


def _stored_rows(
    source: Source, name: str, rows: np.ndarray | None, converted: bool
) -> mx.array | None:
    """Rows of a parameter (all for None), from the file; None where it lies there otherwise.

    `converted` takes mlx-lm's value instead, which reads the tensor whole.
    """
    value = source.parameters[name]
    if name in source.stacks:
        return _stack_rows(source, name, rows)
    if converted:
        flat = value.reshape(-1, value.shape[-1]) if value.ndim else value.reshape(1, 1)
        return flat if rows is None else flat[mx.array(rows)]
    stored = source.stored.get(name)
    if (
        stored is None
        or stored.shape != tuple(value.shape)
        or stored.dtype != stored_dtype(value.dtype)
    ):
        return None
    return _file_rows(stored, value.dtype, rows)


def _stack_rows(source: Source, name: str, rows: np.ndarray | None) -> mx.array:
    """Rows of stacked experts, read from the files of those that the rows fall into."""
    stack = source.stacks[name]
    each = int(np.prod(stack.shape[1:-1], dtype=np.int64))
    if rows is None:
        rows = np.arange(each * stack.shape[0])
    pieces = []
    for expert in np.unique(rows // each):
        inside = rows[rows // each == expert] - expert * each
        pieces.append(_file_rows(stack.parts[int(expert)], stack.dtype, inside))
    return mx.concatenate(pieces)


def _file_rows(stored: TensorOnDisk, dtype: mx.Dtype, rows: np.ndarray | None) -> mx.array:
    width = stored.shape[-1] if stored.shape else 1
    count = int(np.prod(stored.shape, dtype=np.int64)) // max(width, 1)
    raw = np.memmap(stored.file, np.uint8, "r", stored.start, (stored.end - stored.start,))
    lines = raw.reshape(count, -1)
    return mx.array(np.ascontiguousarray(lines if rows is None else lines[rows])).view(dtype)


def _spread(count: int, width: int) -> np.ndarray:
    """Numbers of the rows that are compared: the first, the last and others between them."""
    wanted = min(count, max(_ROWS, _ELEMENTS // max(width, 1)))
    return np.unique(np.linspace(0, count - 1, wanted).round().astype(np.int64))


def _adapters(model: nn.Module) -> dict[str, bool]:
    """The modules that carry an adapter, and whether it changes nothing (a fresh LoRA does)."""
    return {
        path: "m" not in module and not bool(mx.any(module.lora_b))
        for path, module in model.named_modules()
        if "lora_b" in module
    }


def _counts(name: str, held: _Parameters, source: Source) -> bool:
    """Whether a parameter that only one side has is a difference: parts of a packing are none."""
    path, _, part = name.rpartition(".")
    if part not in ("scales", "biases"):
        return True
    return f"{path}.weight" not in held.arrays or f"{path}.weight" not in source.parameters


def _paths(names: Collection[str] | Mapping[str, object]) -> set[str]:
    return {name.rpartition(".")[0] for name in names}


def _same_folder(a: Path | None, b: Path) -> bool:
    return a is not None and a.resolve() == b.resolve()


def _listed(names: Collection[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
