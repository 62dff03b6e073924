"""The picture of docs/course/5-steering.md: python docs/figures/part5.py"""

from __future__ import annotations

import vauban  # before mlx: OpenBLAS

# isort: split
import numpy as np
from drawing import AFTER, FAINT, HARMFUL, HARMLESS, INK, picture

import vauban.prompts

STRENGTHS = [-2.0, -1.5, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0]
SHARES = [0.0, 0.25, 0.5, 0.625, 0.75, 0.875, 1.0]
PROMPTS, TOKENS = 24, 24


def main() -> None:
    path = vauban.organism_path("dense")
    model, tokenizer = vauban.load(path)
    sets = vauban.prompts.model_prompt_sets(path)
    harmful, harmless = (vauban.load_prompts(s)[:64] for s in (sets.harmful, sets.harmless))
    result = vauban.measure(model, tokenizer, harmful, harmless)
    rows = vauban.load_labelled_prompts(sets.eval)
    asked, safe = (
        [row.prompt for row in rows if row.label == label][:PROMPTS]
        for label in ("harmful", "harmless")
    )

    def figures(change: vauban.Intervention) -> tuple[float, float, float, float]:
        """Refused of the harmful and of the harmless, degenerate of both, KL."""
        found = vauban.evaluate(model, [change], tokenizer, asked, max_tokens=TOKENS, harmless=safe)
        answers = (found.refusal_rate_modified, found.over_refusal_modified)
        return *answers, found.degenerate_modified, found.kl_divergence

    added = np.array([figures(vauban.Add.from_result(result, k)) for k in STRENGTHS])
    projected = np.array([figures(vauban.Project(result.direction, a)) for a in SHARES])
    for name, values, table in (("k", STRENGTHS, added), ("alpha", SHARES, projected)):
        for value, row in zip(values, table, strict=True):
            print(f"{name} {value:+.3f}", *(f"{x:.4f}" for x in row))

    figure, save = picture("part5-strength", 7.6, 3.5)
    left, right = figure.subplots(1, 2)
    left.plot(STRENGTHS, added[:, 0], "o-", color=HARMFUL, ms=3, label="harmful, refused")
    left.plot(STRENGTHS, added[:, 1], "o-", color=HARMLESS, ms=3, label="harmless, refused")
    left.plot(STRENGTHS, added[:, 2], "--", color=INK, label="broken answers")
    left.axvline(0, color=FAINT, lw=0.8)
    left.set(xlabel="strength k of the addition", ylabel="share of answers", ylim=(-0.03, 1.3))
    left.set_yticks([0, 0.5, 1])
    left.legend(loc="upper center", ncols=2, fontsize=8, columnspacing=1)

    removing = [i for i, k in enumerate(STRENGTHS) if k < 0]
    right.plot(added[removing, 0], added[removing, 3], "o-", color=INK, ms=4, label="Add, k < 0")
    right.plot(projected[1:, 0], projected[1:, 3], "s-", color=AFTER, ms=4, label="Project, α ≤ 1")
    for i in removing:
        if STRENGTHS[i] in (-2.0, -1.0, -0.5):
            right.annotate(
                f"k = {STRENGTHS[i]:g}", added[i, [0, 3]], (5, 3), textcoords="offset points",
                fontsize=8,
            )  # fmt: skip
    for a, row in zip(SHARES, projected, strict=True):
        if a in (0.5, 0.75, 1.0):
            right.annotate(
                f"α = {a:g}", row[[0, 3]], (5, -10), textcoords="offset points", fontsize=8
            )
    right.set(
        xlabel="harmful prompts refused", ylabel="KL on harmless answers", yscale="log",
        xlim=(-0.05, 1.15),
    )  # fmt: skip
    right.legend(loc="lower left", bbox_to_anchor=(0.35, 0.6), fontsize=8)
    save()


if __name__ == "__main__":
    main()
