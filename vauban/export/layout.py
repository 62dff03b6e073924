"""Under which names and in which shapes the weights are written: as in the source, or another way.

"same" keeps the source's names, shapes and files, "mlx" takes those of mlx-lm's modules, "hf" those
that transformers reads. A tensor that no edit touches is copied byte for byte; of an edited one
mlx-lm's conversion is undone. Knows checkpoints and names; computes no weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from vauban.errors import InputError
from vauban.export.expert_stacks import expert_parts
from vauban.export.origins import Origin, converted_shapes
from vauban.export.source import Source
from vauban.export.tensor_files import Entry, Fact, LateTensors, copied_entry, element_size
from vauban.export.transformers_names import NoPlace, transformers_names

LAYOUTS = ("same", "mlx", "hf")
Item = Entry | LateTensors
Shards = dict[str, list[Item]]
_SHARD = 5 << 30


@dataclass(frozen=True)
class Placement:
    """Which tensors go to which file, under whose names, and what could not be kept."""

    shards: Shards
    layout: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Renamed(LateTensors):
    """An edited module whose tensors get stored names; `facts` is what they will likely be."""

    facts: tuple[Fact, ...] = ()

    def expected(self) -> list[Fact]:
        return list(self.facts)


def place(
    source: Source,
    entries: Mapping[str, Entry],
    edited: Mapping[str, LateTensors],
    changed: Iterable[str],
    layout: str,
) -> Placement:
    """The files of an export in a layout.

    Args:
        entries: parameters as mlx-lm names them; of those in `changed` the bytes are new.
        edited: modules by path, whose tensors are computed when they are written.

    InputError for a layout that does not exist, and for "hf" where the names are not known. Where
    "same" cannot hold an edit, the result is in "mlx" and a note says why.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")
    fresh = {name: entries[name] for name in changed}
    if layout == "hf" and source.same_layout:
        try:
            origins = transformers_names(source, edited)
            return Placement(_renamed(source, entries, fresh, edited, origins), "hf")
        except NoPlace as error:
            raise InputError(
                f"layout 'hf' is not possible for {source.folder}: {error}; take 'same' or 'mlx'"
            ) from error
    if source.same_layout:
        return Placement(_same_names(source, entries, edited), layout)
    if layout != "mlx":
        try:
            return Placement(_renamed(source, entries, fresh, edited, source.origins), layout)
        except NoPlace as error:
            if layout == "hf":
                raise InputError(
                    f"layout 'hf' is not possible for {source.folder}: {error}; take 'mlx'"
                ) from error
            note = (
                f"the source's layout cannot hold this edit ({error}); the weights have mlx-lm's "
                "names and shapes"
            )
            return _by_size(source, entries, edited, (note,))
    return _by_size(source, entries, edited)


def _same_names(
    source: Source, entries: Mapping[str, Entry], edited: Mapping[str, LateTensors]
) -> Shards:
    """The files of a source whose tensors bear mlx-lm's names already."""
    unplaced: dict[str, Item] = {**entries, **edited}
    shards: Shards = {}
    for name, stored in source.stored.items():
        members = shards.setdefault(stored.file.name, [])
        item = unplaced.pop(name, None) or unplaced.pop(name.rpartition(".")[0], None)
        if item is not None:
            members.append(item)
        elif name not in source.parameters:
            # Tensors that mlx-lm drops on loading stay in the file as they are.
            members.append(copied_entry(name, stored))
    shards[max(shards)].extend(unplaced.values())
    return shards


def _renamed(
    source: Source,
    entries: Mapping[str, Entry],
    fresh: Mapping[str, Entry],
    edited: Mapping[str, LateTensors],
    origins: Mapping[str, Origin],
) -> Shards:
    """The source's files under the names of `origins`; mlx-lm must make the same model of them.

    Raises NoPlace for a changed parameter without an origin, and where mlx-lm would not.
    """
    lacking = [n for n in (*fresh, *(f"{path}.weight" for path in edited)) if n not in origins]
    for name in lacking:
        # What the source does not have, the head of an untied model, keeps mlx-lm's name.
        if name in source.parameters:
            raise NoPlace(f"{name} is computed from several stored tensors")
    modules = {path: _renamed_module(item, origins) for path, item in edited.items()}
    new = {name: list(_spread(entry, _origin(name, origins))) for name, entry in fresh.items()}
    owner: dict[str, str] = {}
    dropped: set[str] = set()
    for name, origin in origins.items():
        path, _, part = name.rpartition(".")
        if name in new:
            owner |= dict.fromkeys(origin.names, name)
        elif path in modules and part == "weight":
            owner |= dict.fromkeys(origin.names, path)
        elif name not in entries:
            # Scales: they go with their matrix, or away where it has become floats.
            dropped |= {name, *origin.names}
    split = {
        name: origin
        for name, origin in origins.items()
        if name in source.stored and origin.names != (name,) and name not in owner
    }
    shards: Shards = {}
    placed: set[str] = set()
    for name, stored in source.stored.items():
        members = shards.setdefault(stored.file.name, [])
        # In a source with mlx-lm's names a module's tensors are found by the parameter's.
        path, _, part = name.rpartition(".")
        of = owner.get(name)
        if of is None and origins.get(name) is not None:
            of = name if name in new else path if path in modules and part == "weight" else None
        if of is None and name not in dropped:
            members.extend(_copies(source, name, split.get(name)))
        elif of is not None and of not in placed:
            placed.add(of)
            members.extend([modules[of]] if of in modules else new[of])
    for of in (*modules, *new):
        if of not in placed:
            shards[max(shards)].extend([modules[of]] if of in modules else new[of])
    shards = {file: members for file, members in shards.items() if members}
    _check_names(source, shards, entries, edited)
    return shards


def _copies(source: Source, name: str, origin: Origin | None) -> list[Entry]:
    """A stored tensor as it is, or each expert's part of it under a name of its own."""
    stored = source.stored[name]
    if origin is None:
        return [copied_entry(name, stored)]
    parts = expert_parts(source.stored, [name], stored.shape[0]) if len(origin.names) > 1 else []
    parts = parts or [stored]
    return [copied_entry(n, part) for n, part in zip(origin.names, parts, strict=True)]


def _renamed_module(item: LateTensors, origins: Mapping[str, Origin]) -> _Renamed:
    def entries() -> Iterator[Entry]:
        for entry in item.entries():
            yield from _spread(entry, _origin(entry.name, origins))

    facts = [
        fact
        for part, dtype, shape in item.expected_arrays
        for fact in _facts(dtype, shape, _origin(f"{item.path}.{part}", origins))
    ]
    return _Renamed(item.path, entries, item.expected_arrays, tuple(facts))


def _origin(name: str, origins: Mapping[str, Origin]) -> Origin:
    """A parameter's origin; of scales that are new that of their matrix, with the last word new."""
    if name in origins:
        return origins[name]
    path, _, part = name.rpartition(".")
    matrix = origins.get(f"{path}.weight")
    if matrix is None:
        return Origin((name,))
    if not all(n.endswith(".weight") for n in matrix.names):
        raise NoPlace(f"{matrix.names[0]} has no name for its {part}")
    names = tuple(f"{n.removesuffix('weight')}{part}" for n in matrix.names)
    return Origin(names, matrix.turned)


def _facts(dtype: str, shape: tuple[int, ...], origin: Origin) -> list[Fact]:
    inner = shape[1:] if len(origin.names) > 1 else shape
    if origin.turned:
        inner = (*inner[:-2], inner[-1], inner[-2])
    return [(name, dtype, inner) for name in origin.names]


def _spread(entry: Entry, origin: Origin) -> Iterator[Entry]:
    """An entry under its stored names, cut into its experts and turned as these are stored.

    They are written one after the other: each reads on where the one before it stopped.
    """
    facts = _facts(entry.dtype, entry.shape, origin)
    if len(facts) == 1 and not origin.turned:
        yield replace(entry, name=facts[0][0])
        return
    rest: Iterator[bytes] | None = None
    buffer = bytearray()

    def take(count: int) -> Iterator[bytes]:
        nonlocal rest
        rest = iter(entry.chunks()) if rest is None else rest
        while count:
            if not buffer:
                buffer.extend(next(rest))
            piece = bytes(buffer[:count])
            del buffer[:count]
            count -= len(piece)
            yield piece

    size = element_size(entry.dtype)
    for name, dtype, shape in facts:
        read: Callable[[], Iterable[bytes]]
        if origin.turned:

            def read(shape: tuple[int, ...] = shape) -> Iterator[bytes]:
                for _ in range(math.prod(shape[:-2])):
                    raw = b"".join(take(size * shape[-1] * shape[-2]))
                    yield np.frombuffer(raw, f"V{size}").reshape(shape[-1], shape[-2]).T.tobytes()
        else:

            def read(count: int = size * math.prod(shape)) -> Iterator[bytes]:
                return take(count)

        yield Entry(name, dtype, shape, read)


def _check_names(
    source: Source,
    shards: Shards,
    entries: Mapping[str, Entry],
    edited: Mapping[str, LateTensors],
) -> None:
    """NoPlace unless mlx-lm makes of these names the parameters that are to be written."""
    written = _expected([item for items in shards.values() for item in items])
    shapes = converted_shapes(source.model, written)
    if shapes is None:
        raise NoPlace("mlx-lm does not read these names")
    wanted = {name: shape for name, _, shape in _expected([*entries.values(), *edited.values()])}
    for name in sorted(shapes.keys() | wanted.keys()):
        if name not in wanted:
            raise NoPlace(f"mlx-lm's {source.config.get('model_type')} does not take up {name}")
        if shapes.get(name) != wanted[name]:
            raise NoPlace(f"mlx-lm would make {shapes.get(name)} of {name}")


def _expected(items: Iterable[Item]) -> list[Fact]:
    return [fact for item in items for fact in item.expected()]


def _by_size(
    source: Source,
    entries: Mapping[str, Entry],
    edited: Mapping[str, LateTensors],
    notes: tuple[str, ...] = (),
) -> Placement:
    """mlx-lm's names and shapes in files of at most 5 GB, and what these cannot hold.

    Edited modules come last, when everything that is a copy of their arrays is written.
    """
    copies, lost = _unread(source, entries, edited)
    groups: list[list[Item]] = [[]]
    size = 0
    items: list[Item] = [*entries.values(), *copies, *edited.values()]
    for item in items:
        grows = item.nbytes if isinstance(item, Entry) else _nbytes(source, item)
        if groups[-1] and size + grows > _SHARD:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += grows
    n = len(groups)
    names = [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    shards = dict(zip(names if n > 1 else ["model.safetensors"], groups, strict=True))
    return Placement(shards, "mlx", (*notes, *lost))


def _nbytes(source: Source, item: LateTensors) -> int:
    return int(source.parameters[f"{item.path}.weight"].nbytes)


def _unread(
    source: Source, entries: Mapping[str, Entry], edited: Mapping[str, LateTensors]
) -> tuple[list[Entry], tuple[str, ...]]:
    """Copies of the stored tensors that mlx-lm does not load, and a note where it would stumble."""
    used = {name for origin in source.origins.values() for name in origin.names}
    all_facts = {n: (n, t.dtype, t.shape) for n, t in source.stored.items()}
    whole = converted_shapes(source.model, all_facts.values())
    groups: dict[str, list[str]] = {}
    for name in source.stored:
        if name not in used:
            # Towers and blocks as a whole: model.visual, mtp, model.layers.61.
            key = re.match(r"(?:model\.)?[^.]+(?:\.\d+(?=\.))?", name)
            groups.setdefault(key[0] if key else name, []).append(name)
    written = _expected([*entries.values(), *edited.values()])
    wanted = converted_shapes(source.model, written)
    copies: list[Entry] = []
    lost: list[str] = []
    for members in groups.values():
        rest = [fact for name, fact in all_facts.items() if name not in members]
        if whole is None or converted_shapes(source.model, rest) != whole:
            # The parameters that mlx-lm computes are made of these.
            continue
        more = [all_facts[name] for name in members]
        if wanted is not None and converted_shapes(source.model, [*written, *more]) == wanted:
            copies += [copied_entry(name, source.stored[name]) for name in members]
            written += more
        else:
            lost.append(
                f"{members[0]} and {len(members) - 1} more tensors that mlx-lm does not load have "
                "no place among its own names; layout 'same' keeps them"
            )
    return copies, tuple(lost)
