"""Which files of a model's folder are its weights. Knows names, the index and headers, no tensor.

mlx-lm reads every `model*.safetensors` that lies in the folder, whatever the index says; where that
is too much it is shown a folder of links.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vauban.errors import ModelError, shown

INDEX = "model.safetensors.index.json"
_PATTERN = "model*.safetensors"
_NUMBERED = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a folder's weights, those beside them that do not, and why."""

    folder: Path
    files: tuple[Path, ...]
    ignored: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    @contextmanager
    def loadable(self) -> Iterator[Path]:
        """A folder in which mlx-lm takes exactly `files`: the folder, or one of links to it."""
        if not self.ignored:
            yield self.folder
            return
        with TemporaryDirectory(prefix="vauban-") as place:
            for entry in self.folder.iterdir():
                if entry not in self.ignored:
                    (Path(place) / entry.name).symlink_to(entry.absolute())
            yield Path(place)


def weight_files(folder: Path) -> WeightFiles:
    """The files that the index names, or without one `model.safetensors`, or numbered shards.

    A file beside them is taken too where there is no index and it repeats none of their tensors.
    An index whose shards are missing is passed over where `model.safetensors` stands in for them.

    Raises ModelError for a broken index, missing shards, broken files, and a tensor in two files.
    """
    present = sorted(folder.glob(_PATTERN))
    notes: list[str] = []
    if (folder / INDEX).is_file():
        tensors = _index(folder / INDEX)
        named = sorted(set(tensors.values()))
        missing = [name for name in named if not (folder / name).is_file()]
        if not missing:
            files = [folder / name for name in named if (folder / name) in present]
            if not files:
                raise ModelError(
                    f"{folder / INDEX} names {named[0] if named else 'no file'}; mlx-lm reads "
                    f"{_PATTERN} only"
                )
            _check_apart(files)
            ignored = [file for file in present if file not in files]
            notes = [f"{file} is not loaded: {INDEX} does not name it" for file in ignored]
            return WeightFiles(folder, tuple(files), tuple(ignored), tuple(notes))
        single = folder / "model.safetensors"
        if not single.is_file() or not (
            len(missing) == len(named) or tensors.keys() <= _names(single)
        ):
            raise ModelError(f"{folder} lacks {missing[0]}, which its index names")
        notes.append(
            f"{folder / INDEX} names {missing[0]}, which is missing; {single.name} is read"
        )
    if not present:
        raise ModelError(f"{folder} has no {_PATTERN}; only safetensors are read")
    first = _complete(folder, present)
    taken = {name for file in first for name in _names(file)}
    files, ignored = list(first), []
    for file in present:
        if file in first:
            continue
        if first and taken & _names(file):
            ignored.append(file)
            notes.append(f"{file} is not loaded: {first[0].name} holds {min(taken & _names(file))}")
        else:
            files.append(file)
    _check_apart(files)
    return WeightFiles(folder, tuple(sorted(files)), tuple(ignored), tuple(notes))


def check_weights(folder: Path) -> int:
    """The number of tensors of a folder's weights; ModelError where one cannot be read.

    As `weight_files`, and where the index names a tensor that its file does not hold.
    """
    chosen = weight_files(folder)
    names = {file.name: _names(file) for file in chosen.files}
    if (folder / INDEX).is_file():
        for tensor, name in _index(folder / INDEX).items():
            if name in names and tensor not in names[name]:
                raise ModelError(
                    f"{folder / INDEX} names {tensor} in {name}, which does not hold it; fetch "
                    "that file again"
                )
    return sum(map(len, names.values()))


def check_safetensors(file: Path) -> dict[str, Any]:
    """The header of a safetensors file; ModelError when its sizes do not add up."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if length < 2 or length > min(size - 8, 100_000_000):
            raise ModelError(f"{file} is truncated or no safetensors file ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ModelError(f"{file} has a broken header: {error}") from error
    end = max((t["data_offsets"][1] for k, t in header.items() if k != "__metadata__"), default=0)
    if 8 + length + end != size:
        raise ModelError(
            f"{file} holds {size} bytes, its header promises {8 + length + end}; truncated?"
        )
    return header


def _index(path: Path) -> Mapping[str, str]:
    """{tensor: file} of an index."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} is not JSON: {error}; cut off? Fetch it again") from error
    tensors = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(tensors, dict):
        given = shown(index) if tensors is None else f"weight_map {shown(tensors)}"
        raise ModelError(
            f'{path} holds {given}; expected an object {{"weight_map": {{tensor: file}}}}'
        )
    for tensor, name in tensors.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(
                f"{path}: {tensor} lies in {shown(name)}; expected the name of a file beside it"
            )
    return tensors


def _complete(folder: Path, present: Sequence[Path]) -> list[Path]:
    """`model.safetensors`, or all of its numbered shards; [] where the names do not say.

    ModelError where a numbered shard is missing and there is nothing in its place.
    """
    single = folder / "model.safetensors"
    if single in present:
        return [single]
    numbered = [file for file in present if _NUMBERED.fullmatch(file.name)]
    totals = sorted({file.stem.rpartition("-")[2] for file in numbered})
    lacking = ""
    for total in totals:
        shards = [
            f"model-{i:0{len(total)}d}-of-{total}.safetensors" for i in range(1, int(total) + 1)
        ]
        missing = [name for name in shards if folder / name not in present]
        if not missing:
            return [folder / name for name in shards]
        lacking = lacking or missing[0]
    if lacking:
        raise ModelError(f"{folder} lacks {lacking}, which the names of the other shards promise")
    return []


def _names(file: Path) -> set[str]:
    return check_safetensors(file).keys() - {"__metadata__"}


def _check_apart(files: Sequence[Path]) -> None:
    places: dict[str, Path] = {}
    for file in files:
        for name in sorted(_names(file)):
            if name in places:
                raise ModelError(
                    f"{name} is in both {places[name].name} and {file.name} of {file.parent}; "
                    "take one of them away"
                )
            places[name] = file
