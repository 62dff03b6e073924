"""The verbs that measure, cut, compare and write: `demo`, `vauban MODEL`, `vauban CONFIG.toml`."""

import argparse
import difflib
from pathlib import Path

from vauban.cli import run_lines
from vauban.cli.console import Console
from vauban.cli.edit import edit_file
from vauban.cli.parsers import VERBS
from vauban.cli.setting_flags import settings
from vauban.config import RunConfig, is_edit, load_config, looks_like_hub_id, make_config
from vauban.errors import InputError
from vauban.models import organism_path
from vauban.pipeline import run

_DEMO_OUTPUT = "vauban-demo"


def demo(options: argparse.Namespace) -> int:
    """The run on the bundled dense organism."""
    values = {
        ("model", "path"): str(organism_path("dense")),
        ("output", "dir"): _DEMO_OUTPUT,
        **settings(options),
    }
    return _run(make_config(values), options)


def target(options: argparse.Namespace) -> int:
    """A configuration file, or a model."""
    values = settings(options)
    given = options.target
    if not given:
        raise InputError("no model is named: vauban MODEL, or vauban --help.")
    if given.endswith(".toml") and is_edit(given):
        return edit_file(given, options)
    if given.endswith(".toml"):
        return _run(load_config(given, values), options)
    if not Path(given).exists() and not looks_like_hub_id(given):
        near = difflib.get_close_matches(given, VERBS, n=1)
        hint = f" Did you mean `vauban {near[0]}`?" if near else ""
        raise InputError(
            f"{given}: no such folder, and not a Hub id (org/name) or a command.{hint}"
        )
    return _run(make_config({**values, ("model", "path"): given}), options)


def _run(config: RunConfig, options: argparse.Namespace) -> int:
    console = Console(as_json=options.json)
    with console.progress() as progress:
        result = run(
            config, progress=progress, on_plan=lambda plan: run_lines.header(console, plan)
        )
    run_lines.outcome(console, result)
    console.document(result.to_dict())
    return 0 if result.gates is None or result.gates.ok else 1
