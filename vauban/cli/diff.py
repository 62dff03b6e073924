"""The verb that compares two model folders: `diff BASE EDITED`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from vauban.cli import run_lines
from vauban.cli.console import Console
from vauban.comparison import (
    FolderDiff,
    MatrixChange,
    ModelDiff,
    compare_folders,
    diff_models,
)
from vauban.config import make_config
from vauban.errors import InputError
from vauban.models import model_folder
from vauban.pipeline.before_after import comparison_rows
from vauban.pipeline.prompt_sets import eval_set
from vauban.prompts import load_prompts
from vauban.report import json_safe, pick_samples

_SHOWN = 12


def diff(options: argparse.Namespace) -> int:
    """Print what differs between two folders; 0 whether they are equal or not."""
    file = None if options.json in (False, True) else Path(options.json)
    if file is not None and not file.parent.is_dir():
        raise InputError(f"--json {file}: the folder {file.parent} does not exist.")
    console = Console(as_json=options.json is True)
    prompts, harmless = _prompts(options)
    with console.progress() as progress:
        if prompts is None:
            result = ModelDiff(
                compare_folders(
                    options.base, options.edited, direction=options.direction, progress=progress
                )
            )
        else:
            result = diff_models(
                options.base, options.edited, prompts=prompts, harmless=harmless,
                max_tokens=options.max_tokens, direction=options.direction, progress=progress,
            )  # fmt: skip
    _weights(console, result.folders)
    if result.evaluation is not None:
        _behaviour(console, result)
    if file is not None:
        text = json.dumps(json_safe(result.to_dict()), indent=2, ensure_ascii=False)
        file.write_text(text + "\n", encoding="utf-8")
        console.line(f"written to {file}", "green")
    console.document(result.to_dict())
    return 0


def _prompts(options: argparse.Namespace) -> tuple[list[str] | None, list[str] | None]:
    """The prompts whose answers are compared, and the harmless ones; None without behaviour."""
    given = [*(options.prompt or [])]
    if options.prompts:
        given += load_prompts(options.prompts)
    if not (given or options.behaviour):
        return None, None
    held_out = eval_set(make_config({("model", "path"): options.base}), model_folder(options.base))
    limit = options.num_prompts
    return given or held_out.texts("harmful", limit), held_out.texts("harmless", limit)


def _weights(console: Console, folders: FolderDiff) -> None:
    for finding in folders.findings:
        console.line(finding, "bold")
    for line in folders.summary().splitlines()[1:]:
        console.line(line)
    matrices = [c for c in folders.changes if c.rank is not None]
    shown = sorted(matrices, key=lambda c: -c.relative)[:_SHOWN]
    if shown:
        console.grid(
            ["largest changes", "size", "rank", "of it rounding", "strength"],
            [_row(change) for change in sorted(shown, key=matrices.index)],
        )
    if len(matrices) > len(shown):
        console.line(f"and {len(matrices) - len(shown)} smaller ones (--json FILE lists all)")
    _names(console, "only in the base", folders.only_base)
    _names(console, "only in the edited folder", folders.only_edited)
    _names(console, "other shape", [f"{n} {a} {b}" for n, (a, b) in folders.shapes.items()])
    for key, (before, after) in {
        **folders.settings.configuration, **folders.settings.generation
    }.items():  # fmt: skip
        console.line(f"{key}: {before!r} became {after!r}")
    gigabytes = folders.nbytes / 1e9
    console.line(
        f"{gigabytes:.2f} GB compared in {folders.seconds:.1f} s"
        + (f", {folders.seconds / gigabytes:.1f} s per GB" if gigabytes >= 0.1 else "")
    )


def _row(change: MatrixChange) -> list[str]:
    strength = "–" if change.strength is None else f"{change.strength:.2f}"
    if change.alignment is not None and change.alignment < 0.8:
        strength = "no cut"
    return [
        change.label.removesuffix(".weight"), f"{change.relative:.2%}", change.rank_words,
        f"{change.rounding_share:.0%}", strength,
    ]  # fmt: skip


def _names(console: Console, title: str, names: Sequence[str]) -> None:
    if names:
        more = f", and {len(names) - 5} more" if len(names) > 5 else ""
        console.line(f"{title}: {', '.join(names[:5])}{more}")


def _behaviour(console: Console, result: ModelDiff) -> None:
    assert result.evaluation is not None
    run_lines.table(console, comparison_rows(result.evaluation))
    for name, test in (("refusal", result.refusal), ("over-refusal", result.over_refusal)):
        if test is not None:
            console.line(f"{name} in pairs: {test.summary()}")
    run_lines.samples(console, tuple(pick_samples(result.evaluation.answers)))
    for note in result.evaluation.notes():
        console.warning(note)
