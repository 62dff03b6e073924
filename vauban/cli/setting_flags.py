"""Flags that are read off the configuration's schema, and their values by place in it.

Values go to the configuration's validation as they are, so that a wrong flag and a wrong TOML value
get the same message.
"""

import argparse
import json
import typing
from collections.abc import Iterable
from types import UnionType
from typing import Any, Literal

from vauban.config.keys import Key


def settings(options: argparse.Namespace) -> dict[tuple[str, ...], Any]:
    """The settings that were given on the command line, by their place in the schema."""
    return {
        tuple(name.split(".")[1:]): value
        for name, value in vars(options).items()
        if name.startswith("setting.")
    }


def add_settings(parser: argparse.ArgumentParser, shown: Iterable[Key]) -> None:
    for key in shown:
        setting = key.setting
        if not setting.flag:
            continue
        names = [setting.short, setting.flag] if setting.short else [setting.flag]
        common: dict[str, Any] = {
            "dest": ".".join(("setting", *key.path)),
            "default": argparse.SUPPRESS,
            "help": _help(key),
        }
        if bool in _types(key.field.annotation):
            action = argparse.BooleanOptionalAction if key.default else "store_true"
            parser.add_argument(*names, action=action, **common)
        else:
            metavar = setting.metavar or key.name.upper()
            parser.add_argument(*names, metavar=metavar, type=_reader(key), **common)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document on stdout and nothing else"
    )


def _help(key: Key) -> str:
    text = key.field.description or ""
    if key.default is None or isinstance(key.default, bool):
        return text.replace("%", "%%")
    return f"{text} Default: {key.default}.".replace("%", "%%")


def _reader(key: Key) -> Any:
    """Turns a flag's text into the schema's type; what cannot be turned is left for the schema."""
    kinds = _types(key.field.annotation)

    def read(text: str) -> Any:
        if text in kinds:
            return text
        try:
            if list in kinds and int in kinds:
                return _indices(text)
            if dict in kinds:
                return json.loads(text)
            if float in kinds:
                return float(text)
            if int in kinds:
                return int(text)
        except ValueError:
            return text
        return text

    return read


def _types(annotation: Any) -> set[Any]:
    """The plain types and literal values that an annotation allows."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is Literal:
        return set(arguments)
    if origin is typing.Annotated:
        return _types(arguments[0])
    if origin in (typing.Union, UnionType):
        return set().union(*(_types(part) for part in arguments))
    if origin is dict:
        return {dict}
    if origin is list:
        return {list} | _types(arguments[0])
    return {annotation}


def _indices(text: str) -> list[int]:
    """Block indices as people write them.

    >>> _indices("0-3,7")
    [0, 1, 2, 3, 7]
    """
    indices: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        indices += range(int(first), int(last) + 1) if dash else [int(first)]
    return indices
