"""Heat maps of a refusal surface, and its points along the two directions, as one picture.

Takes a scan, or two scans compared, and draws with matplotlib (extra `plots`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vauban.errors import InputError
from vauban.evaluation import MAPS, Cell, SurfaceComparison, SurfaceScan
from vauban.report.shift_plot import figure_class

_REFUSED, _ANSWERED, _NO_RATE = "#b3261e", "#3b6ea5", "#e3e3e3"


def plot_surface(
    surface: SurfaceScan | SurfaceComparison,
    path: str | Path,
    maps: Sequence[tuple[str, str]] = MAPS,
) -> Path:
    """Write the maps and the points as an image, PNG or SVG by the suffix.

    A row of panels is one scan: refusal rates over each pair of axes, with the counts, then every
    row of the scan along harmfulness and refusal. Cells below the minimum size are grey. Of a
    comparison the first row is before, the second after.

    Raises InputError where matplotlib is missing and for another suffix.
    """
    path = Path(path).expanduser()
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"{path}: a plot is written as .png or .svg")
    scans = (
        {"before": surface.before, "after": surface.after}
        if isinstance(surface, SurfaceComparison)
        else {"": surface}
    )
    columns = len(maps) + 1
    figure = figure_class()(figsize=(3.5 * columns, 3.6 * len(scans)), layout="constrained")
    panels = figure.subplots(len(scans), columns, squeeze=False)
    image = None
    for row, (name, scan) in zip(panels, scans.items(), strict=True):
        for panel, axes in zip(row, maps, strict=False):
            image = _heat_map(panel, scan.cells(*axes), axes)
        _points(row[-1], scan, legend=row is panels[0])
        if name:
            row[0].set_ylabel(f"{name}\n\n{row[0].get_ylabel()}")
    _same_limits([row[-1] for row in panels])
    figure.colorbar(image, ax=panels[:, -2].tolist(), label="share refused", shrink=0.8)
    figure.savefig(path, dpi=110)
    return path


def _heat_map(panel: Any, cells: Sequence[Cell], axes: tuple[str, str]) -> Any:
    """One map: the first axis downwards, the second to the right."""
    values = [list(dict.fromkeys(cell.values[axis] for cell in cells)) for axis in axes]
    values[1].sort(key=lambda v: (isinstance(v, str), v))
    rates = np.full((len(values[0]), len(values[1])), np.nan)
    for cell in cells:
        i, j = (known.index(cell.values[a]) for known, a in zip(values, axes, strict=True))
        if cell.rate is not None:
            rates[i, j] = cell.rate
        dark = cell.rate is not None and cell.rate > 0.6
        panel.text(
            j, i, f"{cell.refused}/{cell.judged}", ha="center", va="center", fontsize=8,
            color="white" if dark else "black",
        )  # fmt: skip
    panel.set_facecolor(_NO_RATE)
    image = panel.imshow(np.ma.masked_invalid(rates), vmin=0, vmax=1, cmap="YlOrRd", aspect="auto")
    panel.set_yticks(range(len(values[0])), [_words(v) for v in values[0]], fontsize=8)
    panel.set_xticks(range(len(values[1])), [_words(v) for v in values[1]], fontsize=8)
    panel.set_ylabel(axes[0], fontsize=9)
    panel.set_xlabel(axes[1], fontsize=9)
    return image


def _points(panel: Any, scan: SurfaceScan, *, legend: bool) -> None:
    for refused, colour, name in ((False, _ANSWERED, "answered"), (True, _REFUSED, "refused")):
        chosen = [p for p in scan.points if p.refused is refused]
        for label, marker in (("harmful", "^"), ("harmless", "o")):
            points = [p for p in chosen if p.row.label == label]
            panel.scatter(
                [p.harmfulness for p in points], [p.refusal for p in points], s=16, alpha=0.7,
                color=colour, marker=marker, linewidths=0, label=f"{label}, {name}",
            )  # fmt: skip
    cosine = "" if scan.cosine is None else f", cosine {scan.cosine:+.2f}"
    panel.set_title(f"two directions{cosine}", fontsize=9)
    panel.set_xlabel("harmfulness, instruction's end", fontsize=9)
    panel.set_ylabel("refusal, template's end", fontsize=9)
    panel.tick_params(labelsize=8)
    if legend:
        panel.legend(fontsize=7, frameon=False)


def _same_limits(panels: Sequence[Any]) -> None:
    """The same scales before and after."""
    for get, put in (("get_xlim", "set_xlim"), ("get_ylim", "set_ylim")):
        ends = [getattr(panel, get)() for panel in panels]
        for panel in panels:
            getattr(panel, put)(min(low for low, _ in ends), max(high for _, high in ends))


def _words(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value).replace("_", " ")
