"""Writes the schema down for people: the annotated file of `vauban init` and the reference page.

Both are read off the schemas.
"""

import json
import textwrap
from pathlib import Path
from typing import Any

from vauban.config.edit_schema import EditConfig
from vauban.config.keys import Key, Section, keys, sections
from vauban.config.run_schema import RunConfig
from vauban.config.study_schema import StudyConfig
from vauban.errors import InputError

_EXAMPLE_MODEL = "mlx-community/Llama-3.2-3B-Instruct-4bit"
_WIDTH = 96


_HEADS: dict[type[Section], str] = {
    RunConfig: "# A vauban run: measure a direction, cut it, compare before and after, export.\n"
    "# Every key is shown with its default; paths are relative to this file.\n"
    "# Check it with `vauban --validate FILE`, run it with `vauban FILE`.\n",
    StudyConfig: "# A vauban study: interventions x scopes on one or more models, every metric.\n"
    "# Every key is shown with its default; paths are relative to this file.\n"
    "# Check it with `vauban --validate FILE`, run it with `vauban study FILE`.\n",
    EditConfig: "# A vauban edit: facts into a model's weights, asked for before and after.\n"
    "# Every key is shown with its default; paths are relative to this file.\n"
    "# Check it with `vauban --validate FILE`, run it with `vauban FILE`.\n",
}


def scaffold(model: str = _EXAMPLE_MODEL, schema: type[Section] = RunConfig) -> str:
    """The text of a complete, annotated configuration: every key with its default."""
    parts = [_HEADS[schema]]
    parts += [_entry(key, model) for key in keys(schema) if key.section is None]
    for name, table in sections(schema).items():
        parts.append(f"[{name}]\n{_comment(' '.join((table.__doc__ or '').split()))}")
        parts += [_entry(key, model) for key in keys(schema) if key.section == name]
    return "\n".join(parts)


def write_scaffold(
    path: str | Path,
    *,
    model: str = _EXAMPLE_MODEL,
    schema: type[Section] = RunConfig,
    force: bool = False,
) -> Path:
    """Write `scaffold()` to a file.

    Raises:
        InputError: the file exists and `force` is not set, or its folder does not exist.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder, expected the name of a file to write.")
    if path.exists() and not force:
        raise InputError(f"{path} exists; give another name, or --force to replace it.")
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist.")
    path.write_text(scaffold(model, schema), encoding="utf-8")
    return path


def reference() -> str:
    """The configuration reference as a markdown page."""
    return "\n".join(
        [
            "# Configuration\n",
            "<!-- Read off vauban/config: edit the schemas there, then run\n"
            "python -m vauban.config > docs/reference/configuration.md -->\n",
            "`vauban init` writes a file with every key (`vauban init --study` one of a study, "
            "`vauban init --edit` one that edits facts); "
            "`vauban --validate FILE` checks one; `vauban FILE` runs it, `vauban study FILE` a "
            "study. Unknown keys are errors. Paths in a file are relative to that file. Flags of "
            "the command line win over the file.\n",
            *_tables(RunConfig, "##"),
            "## A study\n",
            *_tables(StudyConfig, "###"),
            "## An edit of facts\n",
            "A file with [edit] edits facts and cuts nothing.\n",
            *_tables(EditConfig, "###"),
        ]
    )


def _tables(schema: type[Section], level: str) -> list[str]:
    parts = [f"{level} Top level\n", _table([key for key in keys(schema) if key.section is None])]
    for name, table in sections(schema).items():
        parts.append(f"{level} [{name}]\n\n{' '.join((table.__doc__ or '').split())}\n")
        parts.append(_table([key for key in keys(schema) if key.section == name]))
    return parts


def toml_value(value: Any) -> str:
    """A default of the schema as TOML text; JSON's scalars and lists are TOML's as well."""
    return json.dumps(value, ensure_ascii=False)


def _entry(key: Key, model: str) -> str:
    text = f"{key.field.description} Expects {key.setting.expects}."
    if key.required and key.setting.example:
        line = f"{key.name} = {key.setting.example}"
    elif key.required:
        line = f"{key.name} = {toml_value([model] if key.name == 'models' else model)}"
    elif key.default is None:
        line = f"# {key.name} = {key.setting.example}"
    else:
        line = f"{key.name} = {toml_value(key.default)}"
    return f"{_comment(text)}{line}\n"


def _comment(text: str) -> str:
    return "".join(f"# {line}\n" for line in textwrap.wrap(text, _WIDTH))


def _table(chosen: list[Key]) -> str:
    rows = ["| key | default | expects | flag | |", "| --- | --- | --- | --- | --- |"]
    for key in chosen:
        default = "required" if key.required else "–"
        if not key.required and key.default is not None:
            default = f"`{toml_value(key.default)}`"
        flag = f"`{key.setting.flag}`" if key.setting.flag else ""
        rows.append(
            f"| `{key.name}` | {default} | {key.setting.expects} | {flag} "
            f"| {key.field.description} |"
        )
    return "\n".join(rows) + "\n"
