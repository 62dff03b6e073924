"""The study's figures as tables: one row per condition, one column per metric.

Takes a model's block of study.json. A cell holds the value, its 95 % interval and the change from
the baseline, or "n/a".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vauban.report import aligned, decimal, markdown_row

Figure = Mapping[str, Any]

TITLES = {
    "non_refusal_harmful": "harmful answered",
    "unsafe_harmful": "judged unsafe",
    "refusal_harmless": "harmless refused",
    "induced_refusal": "refusal induced",
    "perplexity": "perplexity",
    "cross_entropy": "log-perplexity",
    "task_accuracy": "tasks exact",
    "capability": "tasks",
    "mmlu": "MMLU",
    "arc_cloze": "ARC (cloze)",
    "arc_letter5": "ARC (letters)",
    "degenerate": "degenerate",
    "kl": "KL",
}
"""Headings by the name of a metric, up to its first ":" or " ("."""

NOT_APPLICABLE = "n/a"
_NUMBERS = frozenset({"perplexity", "cross_entropy", "kl"})


def title(name: str) -> str:
    """The heading of a metric, with the set or judge that its name carries.

    >>> title("perplexity: chat"), title("unsafe_harmful (guard x)"), title("my_task")
    ('perplexity, chat', 'judged unsafe', 'my_task')
    """
    name = name.partition(" (")[0]
    base, _, rest = name.partition(": ")
    heading = TITLES.get(base, base)
    return f"{heading}, {rest}" if rest else heading


def is_rate(name: str) -> bool:
    """Whether a metric is a share, shown in percent."""
    return name.partition(":")[0] not in _NUMBERS


def value_text(figure: Figure, value: float | None) -> str:
    """A figure's value in its unit."""
    if value is None:
        return NOT_APPLICABLE
    return f"{100 * value:.1f} %" if is_rate(figure["name"]) else decimal(value)


def cell(figure: Figure, *, change: bool = True) -> str:
    """Value, interval and change, as "96.2 % [92.0, 98.3] (+95.0)"."""
    if figure["value"] is None:
        return NOT_APPLICABLE
    parts = [value_text(figure, figure["value"])]
    if figure["interval"] is not None:
        low, high = figure["interval"]
        if is_rate(figure["name"]):
            parts.append(f"[{100 * low:.1f}, {100 * high:.1f}]")
        else:
            parts.append(f"[{decimal(low)}, {decimal(high)}]")
    moved = figure["delta"]["change"]
    if change and moved is not None:
        parts.append(f"({100 * moved:+.1f})" if is_rate(figure["name"]) else f"({moved:+.3g})")
    return " ".join(parts)


def shown_metrics(conditions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the metrics that apply somewhere, in their order; log-perplexity is the chart's."""
    names = [figure["name"] for figure in conditions[0]["metrics"]]
    applies = {
        figure["name"]
        for condition in conditions
        for figure in condition["metrics"]
        if figure["value"] is not None
    }
    return [n for n in names if n in applies and not n.startswith("cross_entropy")]


def study_rows(block: Mapping[str, Any]) -> tuple[list[str], list[list[str]], list[str]]:
    """(headings, rows, notes) of a model's conditions, values alone, as a terminal has room for."""
    conditions = block["conditions"]
    names = shown_metrics(conditions)
    rows = []
    for condition in conditions:
        figures = {figure["name"]: figure for figure in condition["metrics"]}
        values = [value_text(figures[n], figures[n]["value"]) for n in names]
        rows.append([condition["name"], *values])
    return ["", *map(title, names)], rows, _notes(conditions, names)


def _notes(conditions: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """What does not apply and why, and who judged."""
    missing = [
        f"{title(figure['name'])}: not applicable ({figure['reason']})"
        for figure in conditions[0]["metrics"]
        if figure["name"] not in names and not figure["name"].startswith("cross_entropy")
    ]
    judges = [n.partition(" (")[2].removesuffix(")") for n in names if n.startswith("unsafe")]
    return [*missing, *(f"judged unsafe by: {judge}" for judge in judges if judge)]


def study_table(block: Mapping[str, Any], *, markdown: bool = False) -> str:
    """The conditions of one model; in plain lines values alone, in markdown everything."""
    if not markdown:
        headings, rows, notes = study_rows(block)
        return "\n".join([block["model"], *aligned(headings, rows), *notes])
    conditions = block["conditions"]
    names = shown_metrics(conditions)
    by_name = [{figure["name"]: figure for figure in c["metrics"]} for c in conditions]
    headings = ["", *map(title, names)]
    better = ["better", *(f"*{by_name[0][n]['better']}*" for n in names)]
    lines = [
        f"### {block['model']}\n",
        markdown_row(headings),
        markdown_row(["---"] + ["---:"] * len(names)),
        markdown_row(better),
    ]
    lines += [
        markdown_row([c["name"], *(cell(figures[n], change=n_row > 0) for n in names)])
        for n_row, (c, figures) in enumerate(zip(conditions, by_name, strict=True))
    ]
    notes = [f"\n{note[0].upper()}{note[1:]}." for note in _notes(conditions, names)]
    return "\n".join([*lines, *notes])
