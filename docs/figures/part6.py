"""The picture of docs/course/6-cost-of-an-edit.md: python docs/figures/part6.py"""

from __future__ import annotations

import vauban  # before mlx: OpenBLAS

# isort: split
import mlx.core as mx
import numpy as np
from drawing import AFTER, FAINT, HARMFUL, HARMLESS, INK, picture

import vauban.prompts

PROMPTS, TOKENS = 24, 24


def prices(harmful: list[str], harmless: list[str], sets: vauban.prompts.PromptSets) -> list:
    """(family, label, refused, KL) of every way to cut."""
    model, tokenizer = vauban.load(vauban.organism_path("dense"))
    result = vauban.measure(model, tokenizer, harmful, harmless)
    rows = vauban.load_labelled_prompts(sets.eval)
    asked, safe = (
        [row.prompt for row in rows if row.label == label][:PROMPTS]
        for label in ("harmful", "harmless")
    )
    keys = vauban.collect_preservation_keys(model, tokenizer, harmless[:16])
    mean = result.harmless_mean(result.layer_index)
    unit = mean / mx.linalg.norm(mean)
    biprojected = result.direction - (result.direction * unit).sum() * unit
    ways = [("α", f"{a:g}", {"alpha": a}) for a in (0.5, 0.75, 0.85, 0.93, 1.0)]
    ways += [
        ("null space", f"rank {r}", {"preserve": vauban.Preserve(keys, rank=r)})
        for r in (1, 2, 4, 8, 32)
    ]
    ways += [("sparse", f"{s:.0%}", {"sparse": s}) for s in (0.1, 0.25, 0.35, 0.5)]
    ways += [("biprojected", "", {})]
    out = []
    for family, label, options in ways:
        along = biprojected if family == "biprojected" else result
        plan = vauban.plan_cut(model, along, **options)
        found = vauban.evaluate(model, plan, tokenizer, asked, max_tokens=TOKENS, harmless=safe)
        out.append((family, label, found.refusal_rate_modified, found.kl_divergence))
        print(*out[-1])
    return out


def rounded(harmful: list[str], harmless: list[str]) -> tuple[list[float], list[float]]:
    """Of the direction, what is left in every 4-bit matrix: requantized, and rounded exactly."""
    model, tokenizer = vauban.load(vauban.organism_path("4bit"))
    result = vauban.measure(model, tokenizer, harmful, harmless)
    u = result.direction.astype(mx.float32)
    naive, exact = [], []
    for layer in model.model.layers:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            grid = {"group_size": module.group_size, "bits": module.bits}
            scales, biases = (x.astype(mx.float32) for x in (module.scales, module.biases))
            old = mx.dequantize(module.weight, scales, biases, **grid)
            target = old - u[:, None] * (u @ old)[None]
            fresh = mx.dequantize(*mx.quantize(target, **grid), **grid)
            codes = vauban.quantize_direction_exact(target, u, scales, biases, **grid)
            for to, matrix in (
                (naive, fresh),
                (exact, mx.dequantize(codes, scales, biases, **grid)),
            ):
                to.append((mx.linalg.norm(u @ matrix) / mx.linalg.norm(u @ old)).item())
    print("naive", np.round(naive, 3), "exact", exact)
    return naive, exact


def main() -> None:
    sets = vauban.prompts.model_prompt_sets(vauban.organism_path("dense"))
    harmful, harmless = (vauban.load_prompts(s)[:64] for s in (sets.harmful, sets.harmless))
    table = prices(harmful, harmless, sets)
    naive, exact = rounded(harmful, harmless)

    figure, save = picture("part6-cost", 7.6, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    marks = {"α": (INK, "o-"), "null space": (HARMLESS, "s-"), "sparse": (AFTER, "^-")}
    marks["biprojected"] = (HARMFUL, "D")
    names = {"α": "plain, α", "sparse": "sparse, share of rows"}
    for family, (colour, mark) in marks.items():
        points = np.array([row[2:] for row in table if row[0] == family])
        left.plot(*points.T, mark, color=colour, ms=4, label=names.get(family, family))
        for kind, label, *at in table:
            if kind == family and label in ("0.5", "rank 1", "rank 2", "rank 8", "25%", "50%"):
                offset = (6, 3 if family == "null space" else -11)
                left.annotate(
                    label, at, offset, textcoords="offset points", fontsize=8, color=colour
                )
    left.set(xlabel="harmful prompts refused", ylabel="KL on harmless answers", xlim=(-0.05, 1.2))
    left.set_ylim(0, 0.018)
    left.legend(fontsize=8, loc="upper right")

    blocks = np.arange(len(naive)) / 2
    right.plot(blocks, naive, "o", color=HARMFUL, ms=4, label="requantized")
    right.plot(blocks, exact, "o", color=AFTER, ms=4, label="rounded exactly")
    right.axhline(1e-3, color=FAINT, lw=0.8, ls="--")
    right.set(yscale="log", xlabel="block (attention, MLP)", ylabel="share of the direction left",
              ylim=(1e-6, 30))  # fmt: skip
    right.legend(fontsize=8, loc="upper left")
    save()


if __name__ == "__main__":
    main()
