"""The before/after table as data, and as markdown or plain lines.

One row is one state of the model: before, cut, random direction, addition. The command line
prints the same cells in colour.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vauban.report.figures import decimal, percent, rate_with_interval


@dataclass(frozen=True)
class Share:
    """A rate over prompts with its 95 % Wilson interval."""

    rate: float
    interval: tuple[float, float]
    n: int

    def __str__(self) -> str:
        return rate_with_interval(self.rate, self.interval)


@dataclass(frozen=True)
class BehaviourRow:
    """What a model did in one state; None where that was not measured."""

    name: str
    harmful_refused: Share | None = None
    harmless_refused: Share | None = None
    contrast_refused: Share | None = None
    """Safe requests with alarming words."""
    degenerate: float | None = None
    """Share of the answers to the row's harmful prompts (addition: how-to requests) that are empty
    or loop."""
    perplexity: float | None = None
    """Of the original's answers to the harmless prompts."""
    perplexity_interval: tuple[float, float] | None = None
    kl: float | None = None
    """KL(before ‖ this state) in nats per token, on the same answers."""
    kl_interval: tuple[float, float] | None = None
    """95 % bootstraps over answers, as that of perplexity."""
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


HEADINGS = ("", "harmful refused", "harmless refused", "degenerate", "perplexity", "KL")
NOT_MEASURED = "–"
LEGEND = (
    "brackets: 95% intervals, Wilson for rates, bootstrap over answers for perplexity and KL",
    "degenerate: of the answers to harmful prompts (addition: to how-to requests)",
    "perplexity, KL: on the answers to harmless prompts before the cut",
)
"""What the columns mean, as lines below the table."""


def cells(row: BehaviourRow, *, intervals: bool = True) -> tuple[str, ...]:
    """A row as text, in the order of `HEADINGS`; perplexity and KL with `intervals` or without."""
    return (
        row.name,
        str(row.harmful_refused) if row.harmful_refused else NOT_MEASURED,
        str(row.harmless_refused) if row.harmless_refused else NOT_MEASURED,
        NOT_MEASURED if row.degenerate is None else percent(row.degenerate),
        _number(row.perplexity, row.perplexity_interval if intervals else None, 3),
        _number(row.kl, row.kl_interval if intervals else None, 2),
    )


def _number(value: float | None, interval: tuple[float, float] | None, digits: int) -> str:
    """A figure with its interval; `digits` below 0.1, three from there on."""
    if value is None:
        return NOT_MEASURED
    low, high = interval or (value, value)
    text, *ends = (decimal(v, digits if v < 0.1 else 3) for v in (value, low, high))
    return f"{text} ({ends[0]}–{ends[1]})" if interval else text


def interval_lines(rows: Sequence[BehaviourRow]) -> list[str]:
    """Perplexity and KL with their intervals in words, for a terminal too narrow for them."""
    lines = []
    for column in (4, 5):
        figures = [(row.name, cells(row)[column]) for row in rows]
        known = [f"{name} {text}" for name, text in figures if text != NOT_MEASURED]
        if known:
            lines.append(f"{HEADINGS[column]}: {'; '.join(known)}")
    return lines


def contrast_line(rows: Sequence[BehaviourRow]) -> str | None:
    """Over-refusal of contrast prompts in words; None where it was not measured."""
    shares = [(row.name, row.contrast_refused) for row in rows if row.contrast_refused]
    if not shares:
        return None
    return "safe requests with alarming words refused: " + "; ".join(
        f"{name} {share} of {share.n}" for name, share in shares
    )


def markdown_table(rows: Sequence[BehaviourRow]) -> str:
    """The table as markdown, notes below it."""
    lines = [markdown_row(HEADINGS), markdown_row(["---"] + ["---:"] * (len(HEADINGS) - 1))]
    lines += [markdown_row(cells(row)) for row in rows]
    notes = [f"*{row.name}*: {row.note}" for row in rows if row.note]
    contrast = contrast_line(rows)
    if contrast:
        notes.append(contrast[0].upper() + contrast[1:] + ".")
    return "\n".join(lines) + ("\n\n" + "  \n".join(notes) if notes else "")


def plain_table(rows: Sequence[BehaviourRow]) -> str:
    """The table as aligned lines for a terminal without colours or a log."""
    return "\n".join(aligned(HEADINGS, [cells(row) for row in rows]))


def aligned(headings: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> list[str]:
    """Lines of a table whose first `texts` columns are text and whose others are figures.

    >>> aligned(("", "refused"), [("before", "98 %"), ("cut", "1.6 %")])
    ['        refused', 'before     98 %', 'cut       1.6 %']
    """
    grid = [headings, *rows]
    widths = [max(len(line[i]) for line in grid) for i in range(len(headings))]
    return [
        "  ".join(
            cell.ljust(width) if i < texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in grid
    ]


def markdown_row(parts: Sequence[str]) -> str:
    """One line of a markdown table."""
    return "| " + " | ".join(parts) + " |"
