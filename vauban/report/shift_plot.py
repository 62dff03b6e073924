"""A picture of a hidden shift: the points before and after an edit, and the ellipse of the first.

Takes a `HiddenShift` and draws with matplotlib (extra `plots`).
"""

from pathlib import Path
from typing import Any

import numpy as np

from vauban._extras import need
from vauban.errors import InputError
from vauban.evaluation import HiddenShift

_BEFORE, _AFTER = "#7a7a7a", "#b3261e"
# The square root of χ²'s 95 % quantile with two degrees of freedom.
_RADIUS = 2.447746830680816


def figure_class() -> Any:
    """matplotlib's Figure; InputError that names the extra where it is missing."""
    return need("matplotlib.figure", "plots", "the plot").Figure


def plot_shift(shift: HiddenShift, path: str | Path) -> Path:
    """Write the shift's points on the first two components as an image, PNG or SVG by the suffix.

    Raises InputError where matplotlib is missing and for another suffix.
    """
    path = Path(path).expanduser()
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"{path}: a plot is written as .png or .svg")
    figure = figure_class()(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot()
    for points, colour, label in (
        (shift.before, _BEFORE, "before"),
        (shift.after, _AFTER, "after"),
    ):
        axes.scatter(points[:, 0], points[:, 1], s=14, color=colour, alpha=0.6, label=label)
    turn = np.linspace(0, 2 * np.pi, 200)
    spread = _RADIUS * shift.before.std(0, ddof=1)
    axes.plot(spread[0] * np.cos(turn), spread[1] * np.sin(turn), color=_BEFORE, linewidth=1)
    axes.set_xlabel("first component")
    axes.set_ylabel("second component")
    axes.set_title(
        f"block {shift.layer}: moved by {shift.relative:.1%}, {shift.inside:.0%} in the ellipse",
        fontsize=10,
    )
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return path
