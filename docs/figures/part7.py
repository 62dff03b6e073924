"""The picture of docs/course/7-gates-and-release.md: python docs/figures/part7.py"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import vauban  # before mlx: OpenBLAS

# isort: split
import numpy as np
from drawing import AFTER, FAINT, HARMFUL, HARMLESS, INK, picture

from vauban.cli import main as command

NAMES = {"refusal": "harmful refused", "harmless_refused": "harmless refused",
         "degenerate": "broken answers", "kl": "KL"}  # fmt: skip


def gates(prompts: int) -> list[dict]:
    """The gates of one run on the organism, as run.json holds them."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        model = str(vauban.organism_path("dense"))
        flags = ["--gates", "careful", "--layer", "auto", "--alpha", "1", "-m", "24"]
        command([model, "-o", str(out), *flags, "--num-prompts", str(prompts)])
        found = json.loads((out / "run.json").read_text())["gates"]["results"]
    return [entry for entry in found if entry["gate"]["figure"] in NAMES]


def main() -> None:
    runs = {24: gates(24), 64: gates(64)}
    figure, save = picture("part7-gates", 7.6, 3.3)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    n = np.unique(np.geomspace(5, 400, 40).astype(int))
    left.plot(n, [vauban.wilson_interval(0, int(k))[1] for k in n], color=INK)
    for bound, colour in ((0.10, HARMFUL), (0.06, HARMLESS)):
        least = next(k for k in range(1, 400) if vauban.wilson_interval(0, k)[1] <= bound)
        left.axhline(bound, color=colour, lw=0.9, ls="--")
        left.plot([least], [bound], "o", color=colour, ms=5)
        left.annotate(f"{bound:.2f}: {least} prompts", (least, bound), (4, 6),
                      textcoords="offset points", fontsize=9, color=colour)  # fmt: skip
    left.set(xscale="log", xlabel="prompts, none of them refused", ylim=(0, 0.45),
             ylabel="upper end of the interval")  # fmt: skip
    left.set_xticks([5, 10, 24, 64, 200, 400], ["5", "10", "24", "64", "200", "400"], minor=False)
    left.minorticks_off()

    for row, (figure_name, label) in enumerate(NAMES.items()):
        right.text(-0.006, row, label, ha="right", va="center", fontsize=9)
        for shift, (prompts, found) in zip((-0.17, 0.17), runs.items(), strict=True):
            entry = next(e for e in found if e["gate"]["figure"] == figure_name)
            colour = AFTER if entry["passed"] else HARMFUL
            low, high = entry["interval"]
            right.plot([low, high], [row + shift] * 2, color=colour, lw=2)
            right.plot([entry["estimate"]], [row + shift], "o", color=colour, ms=4)
            beside = high if entry["gate"]["bound"] - high > 0.03 or not entry["passed"] else 0.0
            beside = beside or entry["gate"]["bound"]  # not across the gate
            right.text(beside + 0.004, row + shift, f"n = {prompts}", va="center", fontsize=8,
                       color=colour)  # fmt: skip
            bound = entry["gate"]["bound"]
        right.plot([bound] * 2, [row - 0.4, row + 0.4], color=FAINT, lw=2)
    right.set(xlim=(-0.002, 0.175), ylim=(3.6, -0.6), xlabel="figure, its interval, and the gate")
    right.set_yticks([])
    save()


if __name__ == "__main__":
    main()
