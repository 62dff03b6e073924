"""The front of a search as an interactive page in one file, and as a picture.

Draws refused shares against first-token KL with plotly and matplotlib (extra `plots`). Knows
results; runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vauban._extras import need
from vauban.search.front import Trial
from vauban.search.result import SearchResult

_GREY, _TEAL, _RED, _ORANGE = "#b8bfc6", "#00796b", "#b2182b", "#e08214"
_X, _Y = "first-token KL on harmless prompts (nats)", "harmful prompts refused or degenerate"


def front_page(result: SearchResult, path: str | Path) -> Path:
    """Write one HTML file that needs no network: every trial, its parameters under the pointer."""
    graph = need("plotly.graph_objects", "plots", "the interactive plot")
    figure = graph.Figure()
    for name, trials, colour, symbol in _groups(result):
        figure.add_trace(
            graph.Scatter(
                x=[t.kl for t in trials], y=[t.failed for t in trials], name=name,
                mode="lines+markers" if name == "front" else "markers",
                line={"shape": "hv", "color": colour, "width": 1},
                marker={"color": colour, "symbol": symbol, "size": 14 if len(trials) == 1 else 8},
                text=[_hover(t) for t in trials], hovertemplate="%{text}<extra></extra>",
            )
        )  # fmt: skip
    if result.rescored:
        scores = (result.rescored.default, *result.rescored.front)
        rates, below, above = _fresh(result)
        figure.add_trace(
            graph.Scatter(
                x=[s.kl for s in scores], y=rates, mode="markers", name="on fresh prompts: refused",
                marker={"color": _ORANGE, "symbol": "diamond-open", "size": 9},
                error_y={"type": "data", "symmetric": False, "array": above, "arrayminus": below,
                         "thickness": 1},
                text=[f"trial {s.number} on fresh prompts<br>refused {s.refused:.1%}, over-refused "
                      f"{s.over_refused:.1%}<br>KL {s.kl:.4f}" for s in scores],
                hovertemplate="%{text}<extra></extra>",
            )
        )  # fmt: skip
    figure.update_layout(
        title=_title(result), template="plotly_white", xaxis_title=_X, yaxis_title=_Y,
        yaxis_tickformat=".0%", hovermode="closest",
    )  # fmt: skip
    html = figure.to_html(full_html=True, include_plotlyjs=True, div_id="front")
    Path(path).write_text(html, encoding="utf-8")
    return Path(path)


def front_picture(result: SearchResult, path: str | Path) -> Path:
    """Write the same as a PNG."""
    figure = need("matplotlib.figure", "plots", "the picture").Figure(
        figsize=(8, 5), layout="constrained"
    )
    panel = figure.subplots()
    markers = {"circle": "o", "circle-open": ".", "star": "*", "square": "s"}
    for name, trials, colour, symbol in _groups(result):
        kl, failed = [t.kl for t in trials], [t.failed for t in trials]
        if name == "front":
            panel.step(kl[::-1], failed[::-1], where="post", color=colour, linewidth=1)
        size = 150 if symbol == "star" else 40
        panel.scatter(kl, failed, color=colour, marker=markers[symbol], s=size, label=name)
    if result.rescored:
        rates, below, above = _fresh(result)
        kl = [s.kl for s in (result.rescored.default, *result.rescored.front)]
        panel.errorbar(
            kl, rates, yerr=[below, above], fmt="D", mfc="none", color=_ORANGE, elinewidth=0.8,
            label="on fresh prompts: refused",
        )  # fmt: skip
    panel.set_xlabel(_X)
    panel.set_ylabel(_Y)
    panel.set_title(_title(result), fontsize=10, loc="left")
    panel.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f}%")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return Path(path)


def _groups(result: SearchResult) -> list[tuple[str, Sequence[Trial], str, str]]:
    """(name, trials, colour, marker) of what is drawn, the most important last."""
    drawn = [trial for trial in result.trials if np.isfinite(trial.kl)]
    front = {trial.number for trial in result.front}
    groups: list[tuple[str, Sequence[Trial], str, str]] = [
        ("stopped early", [t for t in drawn if t.state == "pruned"], _GREY, "circle-open"),
        (
            "beaten",
            [t for t in drawn if t.state == "complete" and t.number not in front],
            _GREY,
            "circle",
        ),
        # By KL, so that the line goes down in steps.
        ("front", sorted(result.front, key=lambda t: t.kl), _TEAL, "circle"),
        ("default cut", [t for t in drawn if t.number == 0], _RED, "square"),
    ]
    if result.front and (result.kl_limit is None or _keeps(result)):
        groups.append(("best", [result.best()], _TEAL, "star"))
    return [group for group in groups if group[1]]


def _keeps(result: SearchResult) -> bool:
    """Whether any trial of the front keeps the limit of KL."""
    return any(trial.kl <= (result.kl_limit or 0.0) for trial in result.front)


def _hover(trial: Trial) -> str:
    numbers = "<br>".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in sorted(trial.parameters.items())
    )
    return f"{trial.summary()}<br>{numbers}"


def _fresh(result: SearchResult) -> tuple[list[float], list[float], list[float]]:
    """Refused shares on fresh prompts, and how far their intervals reach below and above."""
    assert result.rescored
    scores = (result.rescored.default, *result.rescored.front)
    return (
        [s.refused for s in scores],
        [s.refused - s.refused_interval[0] for s in scores],
        [s.refused_interval[1] - s.refused for s in scores],
    )


def _title(result: SearchResult) -> str:
    return (
        f"{len(result.trials)} trials, {len(result.front)} on the front; without a cut "
        f"{result.baseline['refused']:.0%} refused"
    )
