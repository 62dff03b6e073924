"""Two folders compared: tensors, formats, changes with rank and direction, settings.

Reads files tensor by tensor and runs no model; its class tells where post-norms stand. `model_diff`
adds behaviour.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vauban._common import Progress
from vauban._results import to_plain
from vauban.comparison.adapter_terms import adapter_terms
from vauban.comparison.folder_settings import SettingsDiff, compare_settings
from vauban.comparison.stored_parameters import StoredParameter, stored_parameters
from vauban.comparison.tensor_changes import Edited, MatrixChange, changes_of
from vauban.comparison.verdict import Shared, findings, shared_changes
from vauban.directions import DirectionResult
from vauban.errors import InputError, VaubanError
from vauban.export.adapter import CONFIG, is_adapter
from vauban.export.source import open_source
from vauban.linalg import as_rows
from vauban.models import model_folder, residual_writers
from vauban.models.loading import check_folder

_WIDTHS = ("hidden_size", "d_model", "n_embd", "model_dim", "dim")


@dataclass(frozen=True)
class FolderDiff:
    """What differs between two folders.

    `tensors` counts the parameters in both, a packed one once; `equal` those with equal values.
    `shapes` and `formats` name what is stored otherwise: (base, edited). `unread` are parameters
    of a type whose bytes alone were compared, and differ. `changes` are in the order of the files.

    >>> import vauban
    >>> dense, packed = vauban.organism_path("dense"), vauban.organism_path("4bit")
    >>> found = vauban.compare_folders(dense, packed)
    >>> found.tensors > 0, len(found.formats) > 0
    (True, True)
    """

    base: str
    edited: str
    adapter: bool
    tensors: int
    equal: int
    only_base: tuple[str, ...]
    only_edited: tuple[str, ...]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    formats: dict[str, tuple[str, str]]
    unread: tuple[str, ...]
    changes: tuple[MatrixChange, ...]
    shared: tuple[Shared, ...]
    settings: SettingsDiff
    nbytes: int
    seconds: float
    findings: tuple[str, ...] = field(default=())

    @property
    def same(self) -> bool:
        """Whether weights, formats and settings are equal."""
        return self.same_weights and not self.settings.differences

    @property
    def same_weights(self) -> bool:
        """Whether the same parameters are stored in the same formats with the same values."""
        differ = (self.only_base, self.only_edited, self.shapes, self.formats, self.unread)
        return not self.changes and not any(differ)

    @property
    def conclusion(self) -> str:
        """The findings in one line."""
        return "; ".join(self.findings)

    def summary(self) -> str:
        lines = [
            f"{self.conclusion}.",
            f"{self.tensors} tensors in both, {self.equal} equal; {len(self.changes)} matrices and "
            "vectors changed",
        ]
        for group in self.shared:
            lines.append(
                f"{group.side} side: {len(group.members)} of {group.of} changes lie along "
                f"{group.rank} common direction{'s'[: group.rank > 1]}, |cosine| >= "
                f"{group.cosine:.3f}"
                + (f"; {len(group.near)} more between 0.5 and 0.9" if group.near else "")
            )
            if group.matches is not None:
                at = "" if group.residual is None else f" (at residual {group.residual})"
                lines.append(f"|cosine| with the given direction{at}: {group.matches:.3f}")
        before, after = self.settings.quantization
        if before != after:
            lines.append(f"quantization in config.json: {before} and {after}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the vectors, JSON-safe."""
        plain = to_plain(replace(self, shared=()))
        return {
            **plain,
            "same": self.same,
            "conclusion": self.conclusion,
            "shared": [group.to_dict() for group in self.shared],
        }


def compare_folders(
    base: str | Path,
    edited: str | Path,
    *,
    direction: Any = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> FolderDiff:
    """Compare two model folders or Hub ids, whoever wrote them; one tensor in memory at a time.

    Packed parameters are compared as the matrices they stand for. `edited` may be an mlx-lm
    adapter of `base`, which is compared as the weights it adds. A change's rank counts the
    singular values above what rounding to the stored types explains (see `changes`).

    Args:
        direction: a direction, a `DirectionResult` or its file; the shared directions of the
            changes are compared with it, and with those of all its layers.

    Raises:
        InputError: an adapter or a direction that does not fit the base.
        ModelError: a folder that is none, files that are truncated, packings of another form than
            config.json says, NaN or inf.

    >>> import vauban
    >>> organism = vauban.organism_path("dense")
    >>> vauban.compare_folders(organism, organism).conclusion
    'weights equal'
    """
    began = time.perf_counter()
    folder = model_folder(base)
    config = check_folder(folder)
    parameters = stored_parameters(folder, config)
    d_model = _width(config)
    wanted = None if direction is None else _directions(direction, d_model)
    other = Path(edited).expanduser()
    adapter = is_adapter(other)
    others: Mapping[str, Edited]
    if adapter:
        others = adapter_terms(other, parameters)
        common = sorted(others)
    else:
        if (other / CONFIG).is_file() and not (other / "config.json").exists():
            raise InputError(f"{other} is no adapter of mlx-lm")
        other = model_folder(edited)
        others = stored_parameters(other, check_folder(other))
        common = [name for name in parameters if name in others]
    shapes, formats, unread = {}, {}, []
    changes: list[MatrixChange] = []
    changed_names = set()
    for number, name in enumerate(common):
        if progress:
            progress("compare tensors", number, len(common))
        mine, yours = parameters[name], others[name]
        if isinstance(yours, StoredParameter):
            if mine.shape != yours.shape:
                shapes[name] = (mine.shape, yours.shape)
                continue
            if mine.format != yours.format:
                formats[name] = (mine.format, yours.format)
            if not (mine.numeric and yours.numeric):
                if not mine.same_bytes(yours):
                    unread.append(name)
                continue
        new = changes_of(mine, yours, d_model, seed)
        changes += new
        changed_names |= {change.name for change in new}
    if progress:
        progress("compare tensors", len(common), len(common))
    tensors = len(parameters) if adapter else len(common)
    diff = FolderDiff(
        base=str(base),
        edited=str(edited),
        adapter=adapter,
        tensors=tensors,
        equal=tensors - len(changed_names) - len(shapes) - len(unread),
        only_base=() if adapter else tuple(n for n in parameters if n not in others),
        only_edited=() if adapter else tuple(n for n in others if n not in parameters),
        shapes=shapes,
        formats=formats,
        unread=tuple(unread),
        changes=tuple(changes),
        shared=tuple(
            _matched(group, wanted) for group in shared_changes(changes, _gains(folder, changes))
        ),
        settings=compare_settings(folder, None if adapter else other),
        nbytes=sum(p.nbytes for p in parameters.values())
        + sum(p.nbytes for p in others.values() if isinstance(p, StoredParameter)),
        seconds=time.perf_counter() - began,
    )
    return replace(diff, findings=findings(diff))


def _width(config: Mapping[str, Any]) -> int | None:
    """The residual stream's width, as the configuration names it."""
    for part in (config, config.get("text_config") or {}):
        for key in _WIDTHS:
            if isinstance(part.get(key), int):
                return int(part[key])
    return None


def _directions(value: Any, size: int | None) -> np.ndarray:
    """(k, d) unit rows: the given direction first, then those of all layers where it has them."""
    if isinstance(value, str | Path):
        value = DirectionResult.load(value)
    rows = as_rows(value, "direction", size)
    if isinstance(value, DirectionResult):
        rows = np.concatenate([rows, as_rows(np.array(value.directions), "directions", size)])
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(lengths, 1e-30)


def _gains(folder: Path, changes: Sequence[MatrixChange]) -> dict[str, np.ndarray]:
    """By name of a changed writer the gain (d,) of the post-norm behind it, as its class has it.

    Nothing for a model that mlx-lm has no class for, or names its parameters otherwise.
    """
    names = {change.name for change in changes if change.left.size}
    if not names:
        return {}
    try:
        writers = residual_writers(open_source(folder).model)
    except VaubanError:
        return {}
    gains = {f"{w.path}.weight": w.gain for w in writers if w.gain is not None}
    return {name: np.array(gains[name], np.float64) for name in names & gains.keys()}


def _matched(group: Shared, wanted: np.ndarray | None) -> Shared:
    if wanted is None:
        return group
    cosines = np.linalg.norm(wanted @ group.directions.T, axis=1)
    best = int(cosines.argmax())
    # Row i >= 1 is the output of block i - 1, residual i.
    return replace(group, matches=float(cosines[best]), residual=best or None)
