"""What goes along with the weights: tokenizer, template, terms of use, small files of any kind.

Knows names and sizes; reads no content. What stays behind is named.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from vauban.models import weight_files
from vauban.models.weight_files import INDEX

# The source's own card goes along under this name: README.md is to say what was done.
SOURCE_CARD = "SOURCE_README.md"
_KEPT = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".jsonl", ".py")
# Files that say how the weights may be used, whatever their suffix and size.
_TERMS = ("license", "licence", "notice", "use_policy", "copying")
# Weights in this or another format, and what only a program that trains reads.
WEIGHT_LIKE = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack"),
    *(".npz", ".npy", ".onnx", ".onnx_data", ".tflite", ".mlmodel", ".pkl", ".pickle"),
)
# What vauban itself writes beside weights; another export's does not describe this one.
_OURS = (INDEX, "run.json", "answers.jsonl", "search.json", "search.html", "search.png")
_SMALL = 1_000_000


def beside_index(folder: Path) -> dict[str, str]:
    """{tensor: file} of the files that the index names and mlx-lm does not read (mtp.safetensors).

    Those that are missing are left out.
    """
    if not (folder / INDEX).is_file():
        return {}
    read = {file.name for file in weight_files(folder).files}
    named = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    return {t: f for t, f in named.items() if f not in read and (folder / f).is_file()}


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy what goes along; a file that is there already is left alone."""
    for path, target in _going(source):
        if (folder / target).exists():
            continue
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        # Under its name it is complete: the next run would not copy it again.
        half = (folder / target).with_name(f"{(folder / target).name}.new")
        with path.open("rb") as reader, half.open("wb") as writer:
            shutil.copyfileobj(reader, writer)
            writer.flush()
            os.fsync(writer.fileno())
        half.replace(folder / target)


def left_behind(source: Path) -> list[str]:
    """The files of a model's folder that an export does not take along, relative to it.

    Hidden ones, and those that vauban wrote there, are not counted.
    """
    kept = {path for path, _ in _going(source)} | set(weight_files(source).files)
    names = (str(path.relative_to(source)) for path in _visible(source) if path not in kept)
    return [name for name in names if not _is_ours(name)]


def weight_like(source: Path) -> list[str]:
    """The files that look like weights and that nothing loads, relative to the folder."""
    used = {*weight_files(source).files, *(source / f for f in beside_index(source).values())}
    return [
        str(path.relative_to(source))
        for path in _visible(source)
        if path.suffix in WEIGHT_LIKE and path not in used
    ]


def _going(source: Path) -> Iterator[tuple[Path, Path]]:
    """(file, where it lies in the copy) of everything but the weights that goes along."""
    beside = {source / name for name in beside_index(source).values()}
    for path in _visible(source):
        relative = path.relative_to(source)
        if path in beside:
            yield path, relative
        elif _is_ours(str(relative)) or path.suffix.lower() in WEIGHT_LIKE:
            continue
        elif relative == Path("README.md"):
            yield path, Path(SOURCE_CARD)
        elif (
            path.suffix in _KEPT
            or path.name.lower().startswith(_TERMS)
            or path.stat().st_size <= _SMALL
        ):
            yield path, relative


def _is_ours(name: str) -> bool:
    return name in _OURS or name.endswith(".vauban") or name in ("direction.safetensors",
        "edit.safetensors")  # fmt: skip


def _visible(source: Path) -> list[Path]:
    return sorted(
        path
        for path in source.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(source).parts)
    )
