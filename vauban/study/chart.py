"""The study's family chart: gain over the baseline per metric and model, best family starred.

Takes the models of study.json and draws with matplotlib (extra `plots`). Red is difference in
means, blue INLP, green classifier weights, as in the chart of the study that is repeated.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vauban.errors import InputError
from vauban.study.tables import title

COLOURS = {
    ("difference in means", "ablation"): "#b2182b",
    ("difference in means", "addition"): "#ef8a62",
    ("INLP", "nullspace"): "#2166ac",
    ("INLP", "flip"): "#67a9cf",
    ("classifier weights", "classifier"): "#1b7837",
}
"""Bar colours of the main conditions by (family, method)."""

_SKIPPED = ("perplexity", "degenerate", "kl")
_TIE = 1e-9


def require_charts() -> Any:
    """matplotlib's Figure class; InputError with the cure where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "the chart needs matplotlib, which is not installed: pip install 'vauban[plots]'"
        ) from error
    return Figure


def family_chart(models: Sequence[Mapping[str, Any]], path: Path | None = None) -> str:
    """Draw one panel per model; write a PNG to `path` where given, return the figure as SVG text.

    Bars are gains: changes from the baseline with the sign that makes higher better, clipped to
    [-1, 1] for the plot only; perplexity is in nats per token. Whiskers are the condition's own
    95 % interval. A star marks every family that has the largest gain of a metric.
    """
    figure_class = require_charts()
    figure = figure_class(figsize=(12, 4.2 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), 1, squeeze=False)[:, 0]
    for panel, block in zip(panels, models, strict=True):
        _draw(panel, block)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    if path is not None:
        figure.savefig(path, dpi=150)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def best_families(bars: Sequence[tuple[str, float | None]]) -> set[str]:
    """The families whose best bar reaches the largest gain of all; none where nothing applies.

    >>> sorted(best_families([("INLP", 0.2), ("difference in means", 0.5), ("INLP", 0.5)]))
    ['INLP', 'difference in means']
    """
    known = [(family, gain) for family, gain in bars if gain is not None]
    if not known:
        return set()
    top = max(gain for _, gain in known)
    return {family for family, gain in known if gain >= top - _TIE}


def main_conditions(block: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The conditions that stand for their methods, in the order of the colours."""
    order = list(COLOURS)
    main = [c for c in block["conditions"] if c["main"] and _key(c) in COLOURS]
    return sorted(main, key=lambda c: order.index(_key(c)))


def chart_metrics(block: Mapping[str, Any]) -> list[str]:
    """The metrics of the chart: all but raw perplexity, which log-perplexity stands for."""
    names = [figure["name"] for figure in block["conditions"][0]["metrics"]]
    return [name for name in names if name.split(":")[0] not in _SKIPPED]


def _key(condition: Mapping[str, Any]) -> tuple[str, str]:
    return condition["family"], condition["method"]


def _draw(panel: Any, block: Mapping[str, Any]) -> None:
    bars, metrics = main_conditions(block), chart_metrics(block)
    width = 0.8 / max(len(bars), 1)
    figures = [{f["name"]: f for f in bar["metrics"]} for bar in bars]
    for number, (bar, by_name) in enumerate(zip(bars, figures, strict=True)):
        at = [x + (number - (len(bars) - 1) / 2) * width for x in range(len(metrics))]
        gains = [by_name[name]["delta"]["clipped"] for name in metrics]
        panel.bar(
            at, [g or 0.0 for g in gains], width, label=f"{bar['family']}: {_plain(bar['name'])}",
            color=COLOURS[_key(bar)],
        )  # fmt: skip
        for x, name, gain in zip(at, metrics, gains, strict=True):
            low, high = _whisker(by_name[name])
            if gain is None and any(f[name]["delta"]["gain"] is not None for f in figures):
                panel.text(x, 0.02, "n/a", ha="center", va="bottom", rotation=90, fontsize=6)
            elif high > low:
                panel.plot([x, x], [low, high], color="black", linewidth=0.8)
    for x, name in enumerate(metrics):
        clipped = [
            (bar["family"], f[name]["delta"]["gain"]) for bar, f in zip(bars, figures, strict=True)
        ]
        best = best_families(clipped)
        if not best:
            panel.text(x, 0.02, "not\napplicable", ha="center", va="bottom", fontsize=7)
        for number, (bar, (_, gain)) in enumerate(zip(bars, clipped, strict=True)):
            if bar["family"] in best and gain is not None and gain >= _top(clipped) - _TIE:
                place = x + (number - (len(bars) - 1) / 2) * width
                panel.text(place, min(max(gain, 0.0), 1.0) + 0.03, "★", ha="center", fontsize=10)
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set_ylim(-1.1, 1.2)
    panel.set_xticks(range(len(metrics)), [_wrapped(title(name)) for name in metrics], fontsize=8)
    panel.set_ylabel("gain over the baseline")
    panel.set_title(block["model"], fontsize=10, loc="left")
    panel.spines[["top", "right"]].set_visible(False)


def _top(bars: Sequence[tuple[str, float | None]]) -> float:
    return max(gain for _, gain in bars if gain is not None)


def _whisker(figure: Mapping[str, Any]) -> tuple[float, float]:
    """The condition's interval as gains; (0, 0) where it has none."""
    change, interval = figure["delta"]["change"], figure["interval"]
    if change is None or interval is None:
        return 0.0, 0.0
    baseline = figure["value"] - change
    ends = [end - baseline for end in interval]
    if figure["better"] == "lower":
        ends = [-end for end in reversed(ends)]
    return max(-1.0, min(1.0, ends[0])), max(-1.0, min(1.0, ends[1]))


def _plain(name: str) -> str:
    """A condition's name without the rank, which differs between the models of one chart."""
    return re.sub(r" \(rank [^)]*\)", "", name)


def _wrapped(text: str) -> str:
    return text.replace(" ", "\n", 1)
