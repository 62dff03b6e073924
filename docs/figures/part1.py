"""Pictures of part 1: the classes by depth, the logit lens, separation by place."""

from __future__ import annotations

import vauban
import vauban.prompts

# isort: split
import mlx.core as mx
import numpy as np
from drawing import AFTER, FAINT, HARMFUL, HARMLESS, INK, picture

PATH = vauban.organism_path("dense")
PLACES = ("<|im_end|>", "newline", "<|im_start|>", "assistant", "newline (last token)")


def main() -> None:
    model, tokenizer = vauban.load(PATH)
    sets = vauban.prompts.model_prompt_sets(PATH)
    prompts = vauban.load_prompts(sets.harmless)[:48] + vauban.load_prompts(sets.harmful)[:48]
    places = vauban.post_instruction_positions(tokenizer)
    read = vauban.collect_activations(model, tokenizer, prompts, positions=places)
    values = np.array(read.values, dtype=np.float64)
    draw_classes(values[:, :, -1])
    draw_places(values)
    draw_lens(model, tokenizer)


def draw_classes(values: np.ndarray) -> None:
    figure, save = picture("part1-classes", height=2.3)
    for panel, r in zip(figure.subplots(1, 4), (1, 2, 3, 4), strict=True):
        centred = values[:, r] - values[:, r].mean(0)
        plane = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
        plane[:, 0] *= np.sign(plane[48:, 0].mean())
        for rows, colour, name in (
            (plane[:48], HARMLESS, "harmless"), (plane[48:], HARMFUL, "harmful"),
        ):  # fmt: skip
            panel.plot(*rows.T, ".", color=colour, markersize=4, label=name)
        panel.set_title(f"after {r} block" + "s" * (r > 1), fontsize=10)
        panel.set(xticks=[], yticks=[])
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2,
        markerscale=2,
    )  # fmt: skip
    save()


def draw_places(values: np.ndarray) -> None:
    low, high = values[:48], values[48:]
    v = high[:24].mean(0) - low[:24].mean(0)
    a, b = (low[24:] * v).sum(-1), (high[24:] * v).sum(-1)
    spread = np.sqrt((a.var(0, ddof=1) + b.var(0, ddof=1)) / 2)
    apart = (b.mean(0) - a.mean(0)) / np.maximum(spread, 1e-9)
    figure, save = picture("part1-places")
    panel = figure.subplots()
    styles = ((FAINT, "-."), (HARMLESS, "--"), (AFTER, ":"), (FAINT, "-"), (HARMFUL, "-"))
    for i, (name, (colour, line)) in enumerate(zip(PLACES, styles, strict=True)):
        panel.plot(apart[:, i], line, color=colour, marker="o", markersize=4, label=name)
    panel.set(xlabel="residual", ylabel="Cohen's d, held-out prompts", xticks=range(7))
    panel.legend(loc="upper left")
    save()


def draw_lens(model: object, tokenizer: object) -> None:
    figure, save = picture("part1-lens", height=2.9)
    refusing = mx.array([tokenizer.encode(word)[0] for word in ("I", "Sorry", "As")])
    helping = tokenizer.encode("Here")[0]
    requests = ("How do I rob the corner shop?", "How do I paint the corner shop?")
    for panel, prompt in zip(figure.subplots(1, 2, sharey=True), requests, strict=True):
        tokens = mx.array([vauban.encode_chat(tokenizer, prompt)])
        p = mx.softmax(vauban.unembed(model, vauban.forward(model, tokens).residual[0, :, 0]), -1)
        refused, helped = p[:, refusing].sum(-1).tolist(), p[:, helping].tolist()
        panel.plot(refused, color=HARMFUL, marker="o", markersize=4, label='"I", "Sorry" or "As"')
        panel.plot(helped, "--", color=HARMLESS, marker="s", markersize=4, label='"Here"')
        panel.set_title(prompt, fontsize=10, color=INK)
        panel.set(xlabel="residual", xticks=range(7))
    figure.axes[0].set_ylabel("probability by the lens")
    figure.axes[0].legend(loc="center right")
    save()


if __name__ == "__main__":
    main()
