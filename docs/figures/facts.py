"""The picture of docs/knowledge.md, from what benchmarks/null_space_claims.py measured:
python docs/figures/facts.py"""

from __future__ import annotations

import json
from pathlib import Path

from drawing import AFTER, FAINT, HARMFUL, HARMLESS, picture

RESULTS = json.loads(Path(__file__).with_name("null_space_claims.json").read_text())
COLOURS = {"lambda C": AFTER, "l2 I": HARMFUL, "projection": HARMLESS}
NAMES = {"lambda C": "λ C on all directions", "l2 I": "l2 I on all directions",
         "projection": "l2 I outside 90 % of tr C"}  # fmt: skip


def main() -> None:
    figure, save = picture("facts-null-space", 7.6, 3.3)
    left, right = figure.subplots(1, 2)
    rows = {float(k): row for k, row in RESULTS["projection"].items() if k[0].isdigit()}
    shares = sorted(rows)
    for name, colour, label in (
        ("seen inside", HARMLESS, "sentences that C was made of"),
        ("seen outside", HARMFUL, "other sentences"),
    ):
        values = [rows[share][name] for share in shares]
        left.plot([100 * s for s in shares], values, "o-", color=colour, ms=4, label=label)
    reference = RESULTS["projection"]["memit_seq"]["seen outside"]
    left.axhline(reference, color=FAINT, lw=1, ls="--")
    left.annotate("λ C, no projection", (0, reference), (2, 3), textcoords="offset points",
                  fontsize=8, color=FAINT)  # fmt: skip
    left.set(xlabel="share of tr C protected, %", ylim=(0, None), title="change of what keys write")
    for name, points in RESULTS["regularisers"].items():
        pairs = [(point["other people"], point["paraphrase"]) for point in points.values()]
        right.plot(*zip(*pairs, strict=True), "o-", color=COLOURS[name], ms=4, label=NAMES[name])
    right.set(xlabel="other people's facts kept", ylabel="paraphrases of the edits",
              title="a penalty in the projection's place")  # fmt: skip
    for panel in (left, right):
        panel.title.set_fontsize(10)
        panel.legend(fontsize=8)
    save()


if __name__ == "__main__":
    main()
