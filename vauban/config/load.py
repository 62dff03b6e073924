"""Reads a configuration: TOML text or command line values in, a checked schema out.

Every message names the file and, where it can be told, the line. No model and no prompt file is
opened.
"""

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from vauban.config.edit_schema import EditConfig
from vauban.config.keys import Key, Section, keys, sections
from vauban.config.run_schema import RunConfig
from vauban.config.study_schema import StudyConfig
from vauban.errors import InputError, shown

_Schema = TypeVar("_Schema", RunConfig, StudyConfig, EditConfig)

Values = Mapping[tuple[str, ...], Any]
"""Values by (section, key), or (key,) at the top level."""


def load_config(path: str | Path, overrides: Values | None = None) -> RunConfig:
    """Read and check the TOML configuration of a run.

    Args:
        path: the file; places named in it are relative to its folder.
        overrides: values that win over the file's, as the command line gives them.

    Raises:
        InputError: the file cannot be read, is not TOML, has an unknown key or a wrong value.
    """
    return _load(Path(path), overrides or {}, RunConfig)


def load_study(path: str | Path, overrides: Values | None = None) -> StudyConfig:
    """Read and check the TOML configuration of a study; as `load_config`."""
    return _load(Path(path), overrides or {}, StudyConfig)


def load_edit(path: str | Path, overrides: Values | None = None) -> EditConfig:
    """Read and check the TOML configuration of an edit of facts; as `load_config`."""
    return _load(Path(path), overrides or {}, EditConfig)


def is_study(path: str | Path) -> bool:
    """Whether a file has a [study] section; False for one that cannot be read."""
    return _has_section(path, "study")


def is_edit(path: str | Path) -> bool:
    """Whether a file has an [edit] section; False for one that cannot be read."""
    return _has_section(path, "edit")


def _has_section(path: str | Path, name: str) -> bool:
    try:
        return name in tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        # `load_config` says what is wrong with it.
        return False


def _load(path: Path, overrides: Values, schema: type[_Schema]) -> _Schema:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such configuration file. `vauban init {path}` writes one to start from."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from error
    _check_names(raw, path, text, schema)
    _place(raw, path.parent, schema)
    return _build(raw, overrides, schema, source=path, text=text)


def make_config(values: Values) -> RunConfig:
    """A configuration from command line values alone; places are relative to where one stands."""
    return _build({}, values, RunConfig, source=None, text="")


def make_edit(values: Values) -> EditConfig:
    """As `make_config`, for an edit of facts."""
    return _build({}, values, EditConfig, source=None, text="")


def _build(
    raw: dict[str, Any], overrides: Values, schema: type[_Schema], *, source: Path | None, text: str
) -> _Schema:
    for path, value in overrides.items():
        table = raw if len(path) == 1 else raw.setdefault(path[0], {})
        table[path[-1]] = value
    try:
        config = schema.model_validate(raw)
    except ValidationError as error:
        raise InputError(_explain(error, set(overrides), schema, source, text)) from error
    if conflict := config.conflict():
        path, why = conflict
        key = next(key for key in keys(schema) if key.path == path)
        where = _named(key, set(overrides), source, text)
        raise InputError(f"{where} is {getattr(getattr(config, path[0]), path[1])!r}, {why}.")
    if isinstance(config, RunConfig):
        _check_gates(config.gates.to_dict(), source, text)
    return config


def _check_gates(table: dict[str, Any], source: Path | None, text: str) -> None:
    """Refuse a bound that is none, and a gate on a figure that no run has."""
    from vauban.evaluation import check_names, read_gates  # opens MLX

    for figure, value in table.items():
        if figure == "preset":
            continue
        try:
            check_names(read_gates({figure: value}))
        except InputError as error:
            where = _where(source or Path("configuration"), text, "gates", figure)
            raise InputError(f"{where}: {error}") from error


def _check_names(raw: dict[str, Any], path: Path, text: str, schema: type[Section]) -> None:
    """Refuse names that the schema does not know, with the nearest one that it does."""
    tables = sections(schema)
    top = [*tables, *(key.name for key in keys(schema) if key.section is None)]
    for name, value in raw.items():
        if name not in top:
            where = _where(path, text, None, name)
            raise InputError(
                f"{where}: unknown {'section' if isinstance(value, dict) else 'key'} "
                f"{_shown(name, value)}.{_suggest(name, top, None, schema)}"
            )
        if name not in tables:
            continue
        if not isinstance(value, dict):
            raise InputError(
                f"{_where(path, text, None, name)}: {name!r} is a section, written [{name}], "
                f"but a {type(value).__name__} was given."
            )
        known = list(tables[name].model_fields)
        free = tables[name].model_config.get("extra") == "allow"
        for key in () if free else value:
            if key not in known:
                raise InputError(
                    f"{_where(path, text, name, key)}: unknown key {key!r} in [{name}]."
                    f"{_suggest(key, known, name, schema)}"
                )


def _shown(name: str, value: Any) -> str:
    return f"[{name}]" if isinstance(value, dict) else repr(name)


def _suggest(name: str, known: list[str], section: str | None, schema: type[Section]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    homes = [key.section or "the top" for key in keys(schema) if key.name == name]
    if homes:
        return (
            f" It belongs in [{homes[0]}]." if homes[0] != "the top" else " It stands at the top."
        )
    place = f"[{section}] knows" if section else "Known are"
    return f" {place} {', '.join(known)}."


def _where(path: Path, text: str, section: str | None, name: str) -> str:
    line = find_line(text, section, name)
    return f"{path}, line {line}" if line else f"{path}"


def find_line(text: str, section: str | None, name: str) -> int | None:
    """The 1-based line on which a key or section is written; None where it cannot be told.

    tomllib reports no lines for valid files, so this follows the plain way of writing TOML
    (headers in brackets, one key a line) and gives up on anything cleverer.
    """
    header_name: str | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        header = re.match(r"\s*\[\s*([\w\-.\"']+)\s*\]", line)
        if header:
            header_name = header[1].strip("\"'")
            if section is None and header_name.split(".")[0] == name:
                return number
            continue
        key = re.match(r"\s*[\"']?([\w\-]+)[\"']?\s*[.=]", line)
        if key and key[1] == name and header_name == section:
            return number
    return None


def _place(raw: dict[str, Any], base: Path, schema: type[Section]) -> None:
    """Make the places that a file names relative to the file's own folder, in place."""
    for key in keys(schema):
        table = raw.get(key.section, {}) if key.section else raw
        value = table.get(key.name)
        if not key.setting.place or not value:
            continue
        if isinstance(value, str):
            table[key.name] = _placed(key, value, base)
        elif isinstance(value, list) and key.setting.place == "model":
            table[key.name] = [_placed(key, v, base) if isinstance(v, str) else v for v in value]


def _placed(key: Key, value: str, base: Path) -> str:
    if key.setting.place == "prompts" and (value == "default" or value.startswith("hf:")):
        return value
    if value in key.setting.words:
        return value
    path = Path(value).expanduser()
    if path.is_absolute():
        return str(path)
    beside = base / path
    if key.setting.place == "model" and looks_like_hub_id(value) and not beside.exists():
        return value
    return str(beside)


def looks_like_hub_id(value: str) -> bool:
    """Whether a string has the form org/name, as opposed to ./folder, /folder or folder."""
    return re.fullmatch(r"[\w][\w.\-]*/[\w][\w.\-]*", value) is not None


def _explain(
    error: ValidationError,
    flags: set[tuple[str, ...]],
    schema: type[Section],
    source: Path | None,
    text: str,
) -> str:
    """One line for each wrong key: where it stands, what was given and what is expected."""
    by_path = {key.path: key for key in keys(schema)}
    worst: dict[tuple[str, ...], Any] = {}
    lines: list[str] = []
    for item in error.errors():
        location = tuple(str(part) for part in item["loc"])
        key = by_path.get(location[:2]) or by_path.get(location[:1])
        if key is None or item["type"] == "missing":
            lines.append(_missing(location, source))
        # Of the alternatives a key allows, the one that was followed furthest says most.
        elif len(location) > len(worst.get(key.path, {"loc": ()})["loc"]):
            worst[key.path] = item
    for path, item in worst.items():
        key = by_path[path]
        where = _named(key, flags, source, text)
        lines.append(f"{where} {_given(item, key)}; expected {key.setting.expects}.")
    return "\n".join(dict.fromkeys(lines))


def _named(key: Key, flags: set[tuple[str, ...]], source: Path | None, text: str) -> str:
    """A key as the user wrote it: its flag, or file, line, section and name."""
    if key.path in flags and key.setting.flag:
        return key.setting.flag
    where = _where(source or Path("configuration"), text, key.section, key.name)
    return f"{where}: {key.name}" if key.section is None else f"{where}: [{key.section}] {key.name}"


def _given(item: Any, key: Key) -> str:
    """What the user gave; inside a list or table, the element that is wrong."""
    inside = item["loc"][len(key.path) :]
    if item["type"] == "extra_forbidden":
        return f"has the unknown key {inside[-1]!r}"
    text = shown(item["input"])
    number = next((part for part in inside if isinstance(part, int)), None)
    return f"is {text}" if number is None else f"is {text} (element {number + 1})"


def _missing(location: tuple[str, ...], source: Path | None) -> str:
    if location[:1] == ("model",):
        if source is None:
            return "no model is named; give --model with a folder or a Hub id."
        return f'{source}: no model is named; add [model] with path = "a folder or a Hub id".'
    if location[:1] == ("study",):
        return f'{source}: no model is named; add [study] with models = ["a folder or a Hub id"].'
    place = "the configuration"
    if len(location) > 1:
        place = f"[{location[0]}]" + (f" {location[1]}" if len(location) > 2 else "")
    return f"{source or 'command line'}: {location[-1]!r} is missing in {place}."
