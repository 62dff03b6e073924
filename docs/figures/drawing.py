"""Pictures of the course, in light and in dark: what every part's script shares.

    figure, save = picture("part1-stream")
    panel = figure.subplots()
    ...
    save()          # docs/assets/course/part1-stream-light.svg and -dark.svg

A page shows both: `![words](../assets/course/part1-stream-light.svg#only-light)` and the dark one
with `#only-dark`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "course"

# Placeholders that no other element has; each becomes a colour of the page's scheme.
INK, FAINT, HARMFUL, HARMLESS, AFTER = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
SCHEMES = {
    "light": {INK: "#1b1f24", FAINT: "#8a929c", HARMFUL: "#b2182b", HARMLESS: "#2b6cb0",
              AFTER: "#00796b"},
    "dark": {INK: "#e6e8eb", FAINT: "#8b94a0", HARMFUL: "#ff7b86", HARMLESS: "#74b3ff",
             AFTER: "#4fd1b8"},
}  # fmt: skip
STYLE = {
    "svg.fonttype": "path", "svg.hashsalt": "vauban", "font.size": 10, "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": FAINT, "axes.titlecolor": INK,
    "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "axes.facecolor": "none", "axes.prop_cycle": matplotlib.cycler(
        color=[HARMFUL, HARMLESS, AFTER, INK, FAINT]
    ),
}  # fmt: skip


def picture(name: str, width: float = 7.2, height: float = 3.4) -> tuple[Any, Callable[[], None]]:
    """An empty figure in inches, and what writes it in both schemes."""
    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0.0)

    def save() -> None:
        stream = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(stream, format="svg", metadata=nothing)
        text = stream.getvalue()
        text = re.sub(r"[ \t]+$", "", text[text.index("<svg") :], flags=re.M)
        ASSETS.mkdir(parents=True, exist_ok=True)
        for scheme, colours in SCHEMES.items():
            drawn = text
            for placeholder, colour in colours.items():
                drawn = drawn.replace(placeholder, colour)
            (ASSETS / f"{name}-{scheme}.svg").write_text(drawn, encoding="utf-8")

    return figure, save
