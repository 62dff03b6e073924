"""The report's charts as inline SVG, drawn by matplotlib (extra `plots`).

Takes numbers, returns text. Colours are written as CSS variables, so that one picture suits a light
page and a dark one; text stays text, in the page's font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vauban._extras import need

# Placeholders that no other element of a picture has, and what the page calls them.
_INK, _FAINT, _HARMFUL, _HARMLESS, _AFTER = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
_VARIABLES = {
    _INK: "--ink", _FAINT: "--faint", _HARMFUL: "--harmful", _HARMLESS: "--harmless",
    _AFTER: "--after",
}  # fmt: skip
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "vauban", "font.size": 9, "text.color": _INK,
    "axes.labelcolor": _INK, "axes.edgecolor": _FAINT, "axes.titlecolor": _INK,
    "xtick.color": _FAINT, "ytick.color": _FAINT, "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "font.family": "sans-serif", "axes.facecolor": "none",
}  # fmt: skip
# The page gives size, font and line joins; a style sheet inside would hold for the whole page.
_REWRITES = (
    (r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r'\1role="img"'),
    (r"<defs>\s*<style.*?</style>\s*</defs>", ""),
    (r"font: (\d+(?:\.\d+)?)px [^;\"]*", r"font-size: \1px"),
)
_SEPARATION = (("auc", "AUC", 1.0), ("cohens_d", "Cohen's d", None))


def separation(direction: Mapping[str, Any]) -> str:
    """AUC and Cohen's d of the classes at every block's output, the chosen one marked."""

    def draw(figure: Any) -> None:
        panels = figure.subplots(len(_SEPARATION), 1, sharex=True)
        for panel, (name, label, top) in zip(panels, _SEPARATION, strict=True):
            values = _floats(direction["scores"][name])
            panel.plot(range(len(values)), values, color=_HARMFUL, marker="o", markersize=3)
            panel.axvline(direction["layer_index"], color=_FAINT, linewidth=1, linestyle=":")
            panel.set_ylabel(label)
            if top is not None:
                panel.set_ylim(min(0.5, np.nanmin(values)) - 0.02, top + 0.02)
        panels[-1].set_xlabel(f"output of block (chosen: {direction['layer_index']})")

    return _svg(draw, 2.9)


def projections(document: Mapping[str, Any]) -> str:
    """Every held-out prompt's projection on the direction, before and after the cut."""

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        rows = [(state, label) for state in ("before", "after") for label in _CLASSES]
        for height, (state, label) in enumerate(reversed(rows)):
            values = _floats(document[state][label])
            spread = np.random.default_rng(0).uniform(-0.22, 0.22, len(values))
            panel.scatter(values, height + spread, s=7, alpha=0.6, linewidths=0,
                          color=_CLASSES[label])  # fmt: skip
        panel.axvline(0, color=_FAINT, linewidth=1)
        panel.set_yticks(range(len(rows)), [f"{label}, {state}" for state, label in reversed(rows)])
        panel.set_xlabel("projection on the unit direction, relative to zero")

    return _svg(draw, 2.4)


_CLASSES = {"harmful": _HARMFUL, "harmless": _HARMLESS}


def candidates(shortlist: Sequence[Mapping[str, Any]], chosen: tuple[int, int]) -> str:
    """The shortlist's answers: refused share against first-token KL; the chosen one filled."""

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        for row in shortlist:
            place = (row["layer"], row["position"])
            panel.scatter(
                row["kl"], row["refused"], s=45, edgecolors=_HARMFUL, linewidths=1.2,
                facecolors=_HARMFUL if place == chosen else "none",
            )  # fmt: skip
            panel.annotate(
                f"{row['layer']}, {row['position']}", (row["kl"], row["refused"]),
                xytext=(6, 4), textcoords="offset points", fontsize=7,
            )  # fmt: skip
        panel.set_xlabel("first-token KL on harmless prompts (nats)")
        panel.set_ylabel("validation prompts refused")
        panel.margins(0.18)
        _percent(panel.yaxis)
        panel.set_ylim(bottom=-0.03)

    return _svg(draw, 2.6)


def length_curve(points: Sequence[Mapping[str, Any]]) -> str:
    """Refused share of answers cut to so many tokens, before and after."""

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        tokens = [point["tokens"] for point in points]
        for state, colour, name in (
            ("original", _HARMFUL, "before"), ("modified", _AFTER, "after"),
        ):  # fmt: skip
            values = _floats([point[state] for point in points])
            panel.plot(tokens, values, color=colour, marker="o", markersize=4, label=name)
        panel.set_xticks(tokens)
        panel.set_xlabel("tokens of the answer that are read")
        panel.set_ylabel("harmful prompts refused")
        panel.set_ylim(-0.03, 1.03)
        _percent(panel.yaxis)
        panel.legend(loc="center right")

    return _svg(draw, 2.4)


def verdicts(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """The five verdicts' counts, before and after, as bars."""

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        labels = list(before)[::-1]
        places = np.arange(len(labels))
        for counts, colour, offset, name in (
            (before, _HARMFUL, 0.19, "before"), (after, _AFTER, -0.19, "after"),
        ):  # fmt: skip
            bars = panel.barh(
                places + offset, [counts[x] for x in labels], 0.36, color=colour, label=name
            )
            panel.bar_label(bars, padding=3, fontsize=7, color=_INK)
        panel.set_yticks(places, labels)
        panel.set_xlabel("answers to harmful prompts")
        panel.margins(x=0.1)
        panel.legend(loc="center right")

    return _svg(draw, 2.5)


def leak_per_writer(writers: Mapping[str, float]) -> str:
    """Share of the direction left, or turned round, in each edited writer, read back."""

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        blocks = [_block_and_part(path) for path in writers]
        parts = sorted({part for _, part in blocks})
        colours = (_HARMFUL, _HARMLESS, _AFTER, _INK)
        for number, part in enumerate(parts):
            rows = [(block, v) for (block, p), v in zip(blocks, writers.values(), strict=True)
                    if p == part]  # fmt: skip
            panel.plot(
                [b for b, _ in rows], _floats([v for _, v in rows]), linestyle="none", marker="o",
                markersize=4, color=colours[number % 4], label=part,
            )  # fmt: skip
        panel.set_ylim(bottom=0)
        panel.set_xlabel("block")
        panel.set_ylabel("direction left")
        panel.legend(loc="best", fontsize=7)

    return _svg(draw, 2.4)


def front(trials: Sequence[Mapping[str, Any]], numbers: Sequence[int], best: int) -> str:
    """A search's trials: what failed against first-token KL, the front as a line."""

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        finished = [t for t in trials if t["kl"] is not None]
        panel.scatter([t["kl"] for t in finished], [_failed(t) for t in finished], s=12,
                      color=_FAINT, label="trials")  # fmt: skip
        line = sorted((t for t in finished if t["number"] in numbers), key=lambda t: t["kl"])
        panel.step([t["kl"] for t in line], [_failed(t) for t in line], where="post",
                   color=_AFTER, marker="o", markersize=4, label="front")  # fmt: skip
        chosen = [t for t in finished if t["number"] == best]
        panel.scatter([t["kl"] for t in chosen], [_failed(t) for t in chosen], s=90, marker="*",
                      color=_HARMFUL, label="exported", zorder=3)  # fmt: skip
        panel.set_xlabel("first-token KL on harmless prompts (nats)")
        panel.set_ylabel("refused or degenerate")
        panel.set_ylim(-0.03, 1.03)
        _percent(panel.yaxis)
        panel.legend(loc="upper right")

    return _svg(draw, 2.6)


def heat_map(rows: Sequence[str], columns: Sequence[str], rates: Any, counts: Any) -> str:
    """Rates (rows, columns) in 0..1 as shades, NaN as an empty field, with counts below."""

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        values = np.asarray(rates, float)
        for i in range(len(rows)):
            for j in range(len(columns)):
                if not np.isfinite(values[i, j]):
                    continue
                panel.fill_between(
                    [j - 0.48, j + 0.48], i - 0.46, i + 0.46, color=_HARMFUL, linewidth=0,
                    alpha=0.08 + 0.72 * values[i, j],
                )  # fmt: skip
                panel.text(j, i, f"{values[i, j]:.0%}\nn {counts[i][j]}", ha="center", va="center",
                           fontsize=7)  # fmt: skip
        turned = {"rotation": 25, "ha": "right"} if max(map(len, columns)) > 8 else {}
        panel.set_xticks(range(len(columns)), columns, **turned)
        panel.set_yticks(range(len(rows)), rows)
        panel.set_xlim(-0.5, len(columns) - 0.5)
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)

    return _svg(draw, 0.9 + 0.38 * len(rows))


def _failed(trial: Mapping[str, Any]) -> float:
    return float(trial["refused"]) + float(trial["degenerate"])


def _block_and_part(path: str) -> tuple[int, str]:
    """The block's index in a module's path and the module's own name."""
    numbers = re.findall(r"\.(\d+)\.", path)
    return (int(numbers[0]) if numbers else -1, path.rsplit(".", 1)[-1])


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], float)


def _percent(axis: Any) -> None:
    axis.set_major_formatter(lambda share, _: f"{100 * share:.0f}%")


def _svg(draw: Callable[[Any], None], height: float) -> str:
    """What `draw` puts into a figure as wide as a phone's screen, without a header or metadata."""
    plots = need("matplotlib", "plots", "the report's charts")
    figures = need("matplotlib.figure", "plots", "the report's charts")
    with plots.rc_context(_STYLE):
        figure = figures.Figure(figsize=(5.4, height), layout="constrained")
        figure.patch.set_alpha(0.0)
        draw(figure)
        stream = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(stream, format="svg", metadata=nothing)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, f"var({variable})")
    return text
