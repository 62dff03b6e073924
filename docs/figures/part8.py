"""The picture of docs/course/8-knowledge.md: python docs/figures/part8.py"""

from __future__ import annotations

import vauban  # before mlx: OpenBLAS

# isort: split
import numpy as np
from drawing import AFTER, HARMFUL, HARMLESS, picture

from vauban.evaluation.facts import target_scores

LAYERS, STEP, MOST = [1, 2], 8, 48
METHODS = {"memit_seq": {}, "memit": {}, "alphaedit": {"energy": 0.9}}
NAMES = {"memit_seq": "with history", "memit": "without history", "alphaedit": "AlphaEdit"}


def main() -> None:
    path = vauban.organism_path("facts")
    model, tokenizer = vauban.load(path)
    facts = vauban.load_facts(path / "facts.jsonl")
    texts = [f"{text} {f.target_true} ." for f in facts for text in (f.text, *f.paraphrases)]
    stats = vauban.collect_key_stats(model, tokenizer, texts, LAYERS)

    def strict(pairs: list[tuple[str, str]]) -> float:
        return float(np.mean([hit for _, hit in target_scores(model, tokenizer, pairs)]))

    curves: dict[str, list[tuple[float, float]]] = {}
    for method, options in METHODS.items():
        model, tokenizer = vauban.load(path)
        settings = vauban.EditSettings(layers=LAYERS, batch_size=1, method=method, **options)
        editor = vauban.Editor(model, tokenizer, settings, stats, contexts=["{}"])
        curves[method] = []
        for start in range(0, MOST, STEP):
            editor.edit(facts[start : start + STEP])
            edited = facts[: start + STEP]
            others = [f for f in facts[56:] if f.subject not in {e.subject for e in edited}][:96]
            curves[method].append((
                strict([(text, f.target_new) for f in edited for text in f.paraphrases]),
                strict([(f.text, f.target_true) for f in others]),
            ))  # fmt: skip
        print(method, np.round(curves[method], 3).tolist())

    figure, save = picture("part8-facts", 7.6, 3.2)
    left, right = figure.subplots(1, 2, sharey=True)
    edits = range(STEP, MOST + 1, STEP)
    for (method, points), colour in zip(curves.items(), (AFTER, HARMFUL, HARMLESS), strict=True):
        for panel, values in zip((left, right), np.array(points).T, strict=True):
            panel.plot(edits, values, "o-", color=colour, ms=4, label=NAMES[method])
    left.set(xlabel="facts edited", ylabel="share of right answers", ylim=(0.5, 1.03),
             title="paraphrases of the edited facts")  # fmt: skip
    right.set(xlabel="facts edited", title="facts of people who were not edited")
    for panel in (left, right):
        panel.title.set_fontsize(10)
        panel.set_xticks(list(edits))
    left.legend(fontsize=9, loc="lower left")
    save()


if __name__ == "__main__":
    main()
