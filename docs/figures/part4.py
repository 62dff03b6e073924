"""Pictures of part 4: refusals by style before and after a cut, and the threshold."""

from __future__ import annotations

from typing import Any

import vauban
import vauban.prompts

# isort: split
import mlx.core as mx
import numpy as np
from drawing import AFTER, FAINT, HARMFUL, HARMLESS, INK, picture

from vauban.evaluation import surface_path

PATH = vauban.organism_path("dense")
TOKENS = 24


def main() -> None:
    model, tokenizer = vauban.load(PATH)
    model.set_dtype(mx.float32)
    sets = vauban.prompts.model_prompt_sets(PATH)
    refusal = vauban.measure(
        model, tokenizer, vauban.load_prompts(sets.harmful), vauban.load_prompts(sets.harmless)
    )
    rows = vauban.load_surface_prompts(surface_path(PATH))
    before = vauban.scan_surface(model, tokenizer, refusal, rows, max_tokens=TOKENS)
    changes = vauban.plan_cut(model, refusal).virtual()
    after = vauban.scan_surface(
        model, tokenizer, refusal, rows, interventions=changes, max_tokens=TOKENS
    )
    draw_styles(before, after)
    draw_threshold(before)


def draw_styles(before: Any, after: Any) -> None:
    figure, save = picture("part4-styles", height=2.8)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, label, colour in zip(
        panels, ("harmful", "harmless"), (HARMFUL, HARMLESS), strict=True
    ):
        for scan, shift, shade, marker, name in (
            (before, 0.13, colour, "o", "before"), (after, -0.13, AFTER, "s", "after"),
        ):  # fmt: skip
            cells = scan.cells("style")
            rates = np.array([100 * getattr(cell, label).rate for cell in cells])
            ends = np.array([getattr(cell, label).interval for cell in cells]).T * 100
            at = np.arange(len(cells)) + shift
            panel.errorbar(
                rates, at, xerr=np.abs(ends - rates), fmt=marker, color=shade, markersize=5,
                linewidth=1.2, label=name,
            )  # fmt: skip
        panel.set_title(f"{label} rows", fontsize=10)
        panel.set(xlim=(-3, 103), xlabel="refused, %", yticks=range(len(cells)))
        panel.set_yticklabels([cell.values["style"] for cell in cells])
        panel.invert_yaxis()
    panels[0].legend(loc="lower center", fontsize=9)
    panels[1].legend(loc="center right", fontsize=9)
    save()


def draw_threshold(scan: Any) -> None:
    figure, save = picture("part4-threshold", height=3.1)
    panel = figure.subplots()
    spread = np.random.default_rng(0)
    for label, colour, marker in (("harmless", HARMLESS, "o"), ("harmful", HARMFUL, "^")):
        points = [point for point in scan.points if point.row.label == label]
        height = np.array([point.refused for point in points], dtype=float)
        panel.plot(
            [point.refusal for point in points], height + spread.uniform(-0.05, 0.05, len(points)),
            marker, color=colour, markersize=3.5, linestyle="", label=f"{label} rows",
        )  # fmt: skip
    fit = scan.threshold()
    x = np.linspace(-40, 110, 60)
    panel.plot(x, 1 / (1 + np.exp(-fit.slope * (x - fit.value))), color=INK, linewidth=1.2)
    panel.axvline(fit.value, color=FAINT, linewidth=0.8, linestyle="--")
    panel.annotate(
        f"half at {fit.value:.1f}", (fit.value, 0.5), xytext=(6, -4), textcoords="offset points",
        fontsize=9,
    )  # fmt: skip
    panel.set(xlabel="projection on the refusal direction", ylabel="refused", yticks=(0, 0.5, 1))
    panel.legend(loc="center left", fontsize=9)
    save()


if __name__ == "__main__":
    main()
