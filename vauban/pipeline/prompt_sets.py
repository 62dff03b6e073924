"""Which prompt sets a run uses, and where each comes from.

A set named in the configuration wins over the one the model's folder names in its vauban.json,
which wins over the bundled one. Reading the files is the prompts room's.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vauban.config import HubDataset, RunConfig, StudyConfig
from vauban.errors import InputError
from vauban.prompts import (
    LabelledPrompt,
    default_eval_path,
    default_prompt_paths,
    load_labelled_prompts,
    measuring_paths,
    model_prompt_sets,
    resolve_prompts,
    spread,
)

LABELS = ("harmful", "harmless")
KINDS = ("harmful", "harmless", "how_to", "contrast")


@dataclass(frozen=True)
class PromptSet:
    """Prompts and their origin, as run.json records it."""

    source: str
    """The file's name, "hf:org/name", or "list"."""
    origin: str
    """"configuration", "model folder" or "bundled"."""
    sha256: str
    """Of the file's bytes, or of the prompts as JSON where there is no file."""
    prompts: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "origin": self.origin,
            "sha256": self.sha256,
            "count": len(self.prompts),
        }


@dataclass(frozen=True)
class EvalSet:
    """The held-out rows of a file by kind, at most the configured number of each."""

    path: Path
    origin: str
    sha256: str
    harmful: tuple[LabelledPrompt, ...]
    harmless: tuple[LabelledPrompt, ...]
    """How-to requests and plain tasks, without the contrast prompts."""
    how_to: tuple[LabelledPrompt, ...]
    """The how-to requests, on which addition is measured; all harmless ones where the file says
    no kind."""
    contrast: tuple[LabelledPrompt, ...]
    """Safe requests with alarming words, for over-refusal; empty where the file has none."""

    def texts(self, kind: str, limit: int | None = None) -> list[str]:
        """The prompts of a kind ("harmful", "harmless", "how_to", "contrast") as texts."""
        return [row.prompt for row in getattr(self, kind)[:limit]]

    @property
    def source(self) -> str:
        """The file's name."""
        return self.path.name

    @property
    def every(self) -> list[str]:
        """All prompts once, harmful ones first."""
        rows = (*self.harmful, *self.harmless, *self.how_to, *self.contrast)
        return list(dict.fromkeys(row.prompt for row in rows))

    def to_dict(self) -> dict[str, Any]:
        counts = {kind: len(getattr(self, kind)) for kind in KINDS}
        return {
            "source": self.source, "origin": self.origin, "sha256": self.sha256, **counts
        }  # fmt: skip


def prompt_set(
    config: RunConfig | StudyConfig, label: str, model_path: str | Path | None
) -> PromptSet:
    """The prompts of one class for measuring.

    Args:
        label: "harmful" or "harmless".
        model_path: the model's folder, where it is known; None looks at no vauban.json.

    Raises:
        InputError: a file that cannot be read or holds no prompts.
    """
    given = getattr(config.data, label)
    number, origin = LABELS.index(label), "configuration"
    bundled = default_prompt_paths()[number]
    if given is None:
        path = measuring_paths(model_path)[number]
        return _from_file(path, "bundled" if path == bundled else "model folder")
    if given == "default":
        return _from_file(bundled, "bundled")
    if isinstance(given, str) and not given.startswith("hf:"):
        return _from_file(Path(given), origin, config.data.column)
    if isinstance(given, HubDataset):
        table = given.model_dump(exclude_none=True)
        return _from_prompts(resolve_prompts(table), f"hf:{given.hf}", origin)
    prompts = resolve_prompts(given, kind=label)
    return _from_prompts(prompts, given if isinstance(given, str) else "list", origin)


def eval_set(config: RunConfig | StudyConfig, model_path: str | Path | None) -> EvalSet:
    """The labelled held-out rows, at most `eval.num_prompts` of each class.

    Where there are more, every kind, language and category keeps its share.

    Raises:
        InputError: the file cannot be read, or one of the two classes is missing.
    """
    given = config.data.eval
    own = model_prompt_sets(model_path) if model_path and given is None else None
    if given is None and own is not None and own.eval is not None:
        path, origin = own.eval, "model folder"
    elif given is None or given == "default":
        path, origin = default_eval_path(), "bundled"
    else:
        path, origin = Path(given), "configuration"
    column = config.data.column if origin == "configuration" else None
    rows = load_labelled_prompts(path, column=column)
    by_label = {label: [row for row in rows if row.label == label] for label in LABELS}
    for label, members in by_label.items():
        if not members:
            others = ", ".join(sorted({repr(row.label) for row in rows}))
            raise InputError(
                f"{path}: no line has the label {label!r} (found: {others}); an evaluation set "
                "needs harmful and harmless prompts."
            )
    limit = config.eval.num_prompts
    contrast = [row for row in by_label["harmless"] if _kind(row) == "contrast"]
    harmless = [row for row in by_label["harmless"] if _kind(row) != "contrast"]
    if not harmless:
        harmless, contrast = contrast, []
    how_to = [row for row in harmless if _kind(row) == "how-to"] or harmless
    return EvalSet(
        path=path,
        origin=origin,
        sha256=_sha256(path),
        harmful=_thinned(by_label["harmful"], limit),
        harmless=_thinned(harmless, limit),
        how_to=_thinned(how_to, limit),
        contrast=_thinned(contrast, limit),
    )


def overlap_warning(sets: Sequence[PromptSet], held_out: EvalSet) -> str | None:
    """A sentence when held-out prompts were measured on too, so that the figures flatter."""
    measured = {prompt for prompts in sets for prompt in prompts.prompts}
    shared = [prompt for prompt in held_out.every if prompt in measured]
    if not shared:
        return None
    return (
        f"{len(shared)} of the {len(held_out.every)} evaluation prompts were also used for "
        f"measuring, so the figures are not held out (first: {shared[0]!r})."
    )


def _kind(row: LabelledPrompt) -> str:
    return str(row.get("kind", "")).replace("_", "-").lower()


def _thinned(rows: Sequence[LabelledPrompt], limit: int) -> tuple[LabelledPrompt, ...]:
    """At most `limit` rows in file order, every kind, language and category in proportion.

    Even distances in the file itself would fall in step with rows that alternate.
    """
    facets = ("kind", "language", "category")
    order = sorted(range(len(rows)), key=lambda i: [str(rows[i].get(f, "")) for f in facets])
    return tuple(rows[i] for i in sorted(spread(order, limit)))


def _from_file(path: Path, origin: str, column: str | None = None) -> PromptSet:
    prompts = tuple(resolve_prompts(path, column=column))
    return PromptSet(path.name, origin, _sha256(path), prompts)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _from_prompts(prompts: Sequence[str], source: str, origin: str) -> PromptSet:
    text = json.dumps(list(prompts), ensure_ascii=False)
    return PromptSet(source, origin, hashlib.sha256(text.encode()).hexdigest(), tuple(prompts))
