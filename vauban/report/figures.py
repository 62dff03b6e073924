"""Figures and texts as people read them: percentages, intervals, sizes, shortened answers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def json_safe(value: Any) -> Any:
    """The value with NaN and infinities as None, which JSON has no words for.

    >>> json_safe({"a": [1.0, float("inf")]})
    {'a': [1.0, None]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: json_safe(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(inner) for inner in value]
    return value


def percent(share: float | None, digits: int = 1) -> str:
    """A share in 0..1 as a percentage; a dash for one that was not measured.

    >>> percent(1.0), percent(0.015625), percent(None)
    ('100.0%', '1.6%', '–')
    """
    return "–" if share is None else f"{100 * share:.{digits}f}%"


def rate_with_interval(rate: float, interval: Sequence[float]) -> str:
    """A rate with its interval in percent, whose digits follow its width.

    >>> rate_with_interval(0.984375, (0.9166, 0.9972)), rate_with_interval(0.5, (0.484, 0.516))
    ('98.4% (92–100)', '50.0% (48.4–51.6)')
    """
    low, high = interval
    digits = 0 if high - low > 0.05 else 1
    return f"{percent(rate)} ({100 * low:.{digits}f}–{100 * high:.{digits}f})"


def decimal(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, without an exponent where it is readable.

    >>> decimal(1.2), decimal(-123.4), decimal(0.0000312), decimal(0.0)
    ('1.20', '-123', '3.12e-05', '0')
    """
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 10**6:
        return f"{value:.{digits - 1}e}"
    return f"{value:#.{digits}g}".rstrip(".") if abs(value) < 10**digits else f"{value:.0f}"


def cuts_all(export: Mapping[str, Any]) -> bool:
    """Whether all of the direction was to go, by plan."""
    return export["expected_left"] is not None and export["expected_left"] < 1e-3


def written_cut(export: Mapping[str, Any]) -> str:
    """What reading the written file back shows of the cut, as the end of a sentence.

    What is left of the direction where all of it was to go; else how far the worst writer is from
    its plan: a strength other than 1 leaves part of the direction, or turns it round.

    >>> written_cut({"expected_left": 0.0, "direction_left": 0.0021, "missed": {"a": 0.0021}})
    'in none of them more than 0.21% of the direction is left, read back from the file'
    """
    if cuts_all(export):
        left = f"{100 * export['direction_left']:.2g}%"
        return f"in none of them more than {left} of the direction is left, read back from the file"
    missed = 100 * max(export["missed"].values())
    return (
        f"none of them more than {missed:.2g}% of the direction away from what its strength leaves "
        "or turns round, read back from the file"
    )


def byte_size(count: int) -> str:
    """A size in decimal units, as disks and downloads are labelled.

    >>> byte_size(5_260_000), byte_size(512)
    ('5.3 MB', '512 B')
    """
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def quantity(count: int) -> str:
    """A count of parameters.

    >>> quantity(1_310_000), quantity(8_030_000_000), quantity(950)
    ('1.3 M', '8.0 B', '950')
    """
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return str(count)


def seconds(span: float) -> str:
    """A time span.

    >>> seconds(0.42), seconds(61), seconds(7300)
    ('0.4 s', '1 min 01 s', '2 h 01 min')
    """
    if span < 60:
        return f"{span:.1f} s"
    minutes, rest = divmod(round(span), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def shorten(text: str, width: int) -> str:
    """The text on one line, cut at a word to at most `width` characters.

    >>> shorten("one two  three\\nfour", 14)
    'one two three…'
    """
    line = " ".join(text.split())
    if len(line) <= width:
        return line
    head = line[: width - 1]
    at_word = head if line[width - 1] == " " else head.rsplit(" ", 1)[0]
    # One long word has no space to cut at; then the cut goes through it.
    return (at_word if len(at_word) > width // 2 else head).rstrip() + "…"
