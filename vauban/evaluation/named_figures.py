"""A run's figures by name: short names, dotted paths, each with the interval that belongs to it.

Knows mappings such as run.json holds; knows no model and no file. `gates` compares figures with
bounds, `vauban.comparison.runs` those of two runs.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vauban.errors import InputError, shown

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class ShortName:
    """Where a figure stands in run.json, which way is better after a cut, and what it says."""

    path: str
    better: Better | None
    meaning: str


_EVALUATION, _CUT = "evaluation", "behaviour.cut"

SHORT_NAMES: dict[str, ShortName] = {
    "refusal": ShortName(
        f"{_EVALUATION}.refusal_rate_modified", "lower", "harmful prompts refused after the cut"
    ),
    "refusal_before": ShortName(
        f"{_EVALUATION}.refusal_rate_original", None, "harmful prompts refused before it"
    ),
    "refusal_change": ShortName(
        f"{_EVALUATION}.paired.difference", "lower", "the change on the same prompts, in pairs"
    ),
    "harmless_refused": ShortName(
        f"{_EVALUATION}.over_refusal_modified", "lower", "harmless prompts refused after the cut"
    ),
    "contrast_refused": ShortName(
        f"{_CUT}.contrast_refused", "lower", "safe prompts with alarming words refused after it"
    ),
    "degenerate": ShortName(
        f"{_EVALUATION}.degenerate_modified", "lower", "answers that are empty, loop or are salad"
    ),
    "kl": ShortName(
        f"{_EVALUATION}.kl_divergence", "lower", "KL(before ‖ after) per answer token, harmless"
    ),
    "first_token_kl": ShortName(
        f"{_EVALUATION}.first_token_kl", "lower", "the same of the first answer token alone"
    ),
    "perplexity": ShortName(
        f"{_EVALUATION}.perplexity_modified", "lower", "of the harmless answers before the cut"
    ),
    "perplexity_ratio": ShortName(
        f"{_EVALUATION}.perplexity_ratio", "lower", "perplexity after the cut over that before it"
    ),
    "harmful_prompts": ShortName(f"{_EVALUATION}.num_prompts", "higher", "harmful prompts asked"),
    "harmless_prompts": ShortName(
        f"{_EVALUATION}.num_harmless", "higher", "harmless prompts asked"
    ),
    "direction_left": ShortName(
        "export.direction_left", "lower", "of the direction in the written weights, worst writer"
    ),
    "stream_left": ShortName("leak.stream", "lower", "of the direction in the residual stream"),
    "logits_difference": ShortName(
        "export.logits_difference", "lower", "of the written folder from the run-time cut"
    ),
}  # fmt: skip
"""Figures by the name that a person would type; any other one by its dotted path in run.json."""

SECTIONS = (
    "evaluation", "behaviour", "export", "leak", "strength", "direction", "cut", "search", "surface"
)  # fmt: skip
"""The tables of run.json that hold figures."""

_ESTIMATES = ("rate", "estimate", "difference", "value")


@dataclass(frozen=True)
class Figure:
    """A number with its 95 % interval, where it has one; `estimate` is None where nothing was
    measured."""

    name: str
    path: str
    estimate: float | None
    interval: tuple[float, float] | None


def find_figure(figures: Mapping[str, Any], name: str) -> Figure:
    """A figure by its short name or its dotted path.

    The rows of a list that have a "name" are steps of a path (`behaviour.cut.kl`). The interval
    stands beside a figure as `intervals.NAME`, `NAME_interval`, or as `interval` beside a rate.

    Raises:
        InputError: no such figure (the nearest names are suggested), or one that is no number.

    >>> figure = find_figure({"kl": 0.2, "kl_interval": [0.1, 0.3]}, "kl")
    >>> figure.estimate, figure.interval
    (0.2, (0.1, 0.3))
    """
    for path in (name, *([SHORT_NAMES[name].path] if name in SHORT_NAMES else [])):
        try:
            parent, leaf, value = _follow(figures, path)
        except KeyError:
            continue
        return Figure(name, path, *_number(parent, leaf, value, path))
    raise InputError(unknown_figure(name, [path for path, _ in numbers(figures)]))


def numbers(figures: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(dotted path, value) of every number below a mapping, booleans left out."""
    for key, value in _children(figures):
        if isinstance(value, bool):
            continue
        if isinstance(value, int | float):
            yield key, float(value)
        elif isinstance(value, Mapping | list):
            yield from ((f"{key}.{rest}", number) for rest, number in numbers(_mapping(value)))


def with_ratio(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    """The figures with `perplexity_ratio` beside the perplexities, which no file holds.

    A result of `evaluate`, or its dictionary, is put under "evaluation", as run.json has it.
    """
    if "refusal_rate_modified" in figures:
        figures = {_EVALUATION: figures}
    table = figures.get(_EVALUATION)
    if not isinstance(table, Mapping) or "perplexity_ratio" in table:
        return figures
    before, after = (table.get(f"perplexity_{side}") for side in ("original", "modified"))
    if before is None or after is None:
        return figures
    ratio = after / before if before else math.nan
    return {**figures, _EVALUATION: {**table, "perplexity_ratio": ratio}}


def _follow(figures: Mapping[str, Any], path: str) -> tuple[Mapping[str, Any], str, Any]:
    """(the table that holds the figure, its key, its value); KeyError where a step is missing.

    Keys may hold dots themselves (paths of modules), so that at each step the longest one counts.
    """
    table, rest = figures, path
    while True:
        children = dict(_children(table))
        keys = [key for key in children if rest == key or rest.startswith(f"{key}.")]
        if not keys:
            raise KeyError(path)
        key = max(keys, key=len)
        if rest == key:
            return table, key, children[key]
        rest, value = rest[len(key) + 1 :], children[key]
        if not isinstance(value, Mapping | list):
            raise KeyError(path)
        table = _mapping(value)


def _children(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((str(key), value) for key, value in table.items())


def _mapping(value: Mapping[str, Any] | list[Any]) -> Mapping[str, Any]:
    """A list as a mapping: rows by their names, others by their place."""
    if isinstance(value, Mapping):
        return value
    return {
        str(row["name"]) if isinstance(row, Mapping) and "name" in row else str(place): row
        for place, row in enumerate(value)
    }


def _number(
    parent: Mapping[str, Any], leaf: str, value: Any, path: str
) -> tuple[float | None, tuple[float, float] | None]:
    """(estimate, interval) of what a path leads to."""
    if isinstance(value, Mapping):
        key = next((key for key in _ESTIMATES if key in value), None)
        if key is None:
            inside = ", ".join(f"{path}.{name}" for name in list(value)[:6])
            raise InputError(f"{path} is a table and no figure; it holds {inside}.")
        return _number(value, key, value[key], f"{path}.{key}")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise InputError(f"{path} is {shown(value)}; expected a number.")
    return None if value is None else float(value), _interval(parent, leaf)


def _interval(parent: Mapping[str, Any], leaf: str) -> tuple[float, float] | None:
    several = parent.get("intervals")
    places = [
        several.get(leaf) if isinstance(several, Mapping) else None,
        parent.get(f"{leaf}_interval"),
        parent.get("interval") if leaf in _ESTIMATES else None,
    ]
    for given in places:
        # JSON has no NaN and no infinity: an end that was one is None, and no end to compare.
        if isinstance(given, Sequence) and len(given) == 2 and None not in given:
            return float(given[0]), float(given[1])
    return None


def unknown_figure(name: str, known: Sequence[str]) -> str:
    """Says that there is no such figure, and which name was probably meant."""
    candidates = [*SHORT_NAMES, *known]
    near = difflib.get_close_matches(name, candidates, n=3, cutoff=0.6)
    near = near or [path for path in known if path.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    hint = (
        f"Did you mean {' or '.join(map(repr, near[:3]))}?"
        if near
        else f"Short names: {', '.join(SHORT_NAMES)}; others by their path, as evaluation.kl_..."
    )
    return f"there is no figure {name!r}. {hint}"
