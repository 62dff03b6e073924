"""Pictures of part 3: two scores of a layer, the cut of one matrix, what variants cost."""

from __future__ import annotations

from typing import Any

import vauban
import vauban.prompts

# isort: split
import mlx.core as mx
import numpy as np
from drawing import AFTER, FAINT, HARMFUL, HARMLESS, INK, picture

PATH = vauban.organism_path("dense")


def main() -> None:
    model, tokenizer = vauban.load(PATH)
    model.set_dtype(mx.float32)
    sets = vauban.prompts.model_prompt_sets(PATH)
    result = vauban.measure(
        model, tokenizer, vauban.load_prompts(sets.harmful), vauban.load_prompts(sets.harmless)
    )
    draw_choice(result)
    draw_geometry(model, np.array(result.direction, dtype=np.float64))
    draw_costs(model, tokenizer, result, vauban.load_labelled_prompts(sets.eval))


def draw_choice(result: Any) -> None:
    figure, save = picture("part3-choice", height=2.7)
    for panel, title, values in zip(
        figure.subplots(1, 2),
        ("gap of the means", "Cohen's d, held-out prompts"),
        (result.cosine_scores, result.scores["cohens_d"]),
        strict=True,
    ):
        best = int(np.argmax(values))
        panel.bar(range(6), values, color=FAINT, width=0.6)
        panel.bar([best], [values[best]], color=HARMFUL, width=0.6)
        panel.set(xlabel="block", xticks=range(6))
        panel.set_title(title, fontsize=10)
    save()


def draw_geometry(model: Any, d: np.ndarray) -> None:
    writer = np.array(model.model.layers[3].self_attn.o_proj.weight, dtype=np.float64)
    row = d @ writer
    after = writer - np.outer(d, row)
    figure, save = picture("part3-geometry", height=3.0)
    left, right = figure.subplots(1, 2)
    across = np.linalg.norm(after, axis=0)  # a column's length across d: the same before and after
    left.hlines(across, np.minimum(row, 0), np.maximum(row, 0), color=FAINT, linewidth=0.5)
    left.plot(row, across, ".", color=HARMFUL, markersize=5, label="before")
    left.plot(0 * row, across, ".", color=AFTER, markersize=5, label="after")
    left.set(xlabel="column's part along d", ylabel="column's part across d")
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=9)
    ratio = np.linalg.norm(after, axis=1) / np.linalg.norm(writer, axis=1)
    grown = ratio > 1
    right.axhline(1.0, color=FAINT, linewidth=0.8)
    for rows, colour, word in ((~grown, HARMLESS, "shrink"), (grown, HARMFUL, "grow")):
        right.plot(np.abs(d[rows]), ratio[rows], ".", color=colour, label=f"{rows.sum()} {word}")
    right.set(xlabel="|component of d|", ylabel="row norm, after / before")
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=9)
    save()


def draw_costs(model: Any, tokenizer: Any, result: Any, rows: list[Any]) -> None:
    requests = [row.prompt for row in rows if row.label == "harmful"][:32]
    safe = [row.prompt for row in rows if row.label == "harmless"][:24]
    answers = vauban.generate(model, tokenizer, safe, max_tokens=24)

    def price(plan: vauban.EditPlan) -> tuple[float, float]:
        changes = plan.virtual()
        said = vauban.measure_behaviour(
            model, tokenizer, requests, interventions=changes, max_tokens=24
        )
        cost = vauban.compare_likelihood(model, tokenizer, safe, answers, interventions=changes)
        return cost.kl, 100 * said.rate

    figure, save = picture("part3-costs", height=3.6)
    panel = figure.subplots()
    d = result.direction
    series = {
        "strength α": (HARMFUL, "o", {
            f"α {alpha}": vauban.plan_cut(model, d, alpha=alpha) for alpha in (0.25, 0.5, 0.75, 1.5)
        }),
        "blocks": (HARMLESS, "s", {
            name: vauban.plan_cut(model, d, layers=layers)
            for name, layers in (("3–5", range(3, 6)), ("1–5", range(1, 6)), ("0–3", range(4)))
        }),
        "sparsity": (AFTER, "^", {
            f"{share:.0%}": vauban.plan_cut(model, vauban.sparsify_direction(d, share))
            for share in (0.5, 0.8, 0.9, 0.95)
        }),
        "plain cut in all blocks": (INK, "D", {"": vauban.plan_cut(model, d)}),
    }  # fmt: skip
    for label, (colour, marker, plans) in series.items():
        points = {name: price(plan) for name, plan in plans.items()}
        panel.plot(*zip(*points.values(), strict=True), marker, color=colour, label=label)
        for name, (kl, refused) in points.items():
            panel.annotate(
                name, (kl, refused), xytext=(0, 7), textcoords="offset points", fontsize=8,
                color=colour, ha="center",
            )  # fmt: skip
    panel.set(xlabel="KL on harmless answers (nats a token)", ylabel="harmful prompts refused, %")
    panel.set_ylim(-6, 110)
    panel.legend(loc="center right")
    save()


if __name__ == "__main__":
    main()
