"""The model card of edited facts: which ones, how, and what the written model says of them.

Reads the run document (what run.json holds).
"""

from collections.abc import Mapping
from typing import Any

from vauban.report.figures import decimal, percent, quantity, rate_with_interval, shorten
from vauban.report.source_card import front_matter

_RATES = (
    ("efficacy", "the prompt"),
    ("paraphrase", "its paraphrases"),
    ("neighbourhood", "other subjects stay"),
)
_SHOWN = 40


def fact_card(run: Mapping[str, Any]) -> str:
    """The card as markdown with the Hub's front matter."""
    model, report = run["model"], run["report"]
    settings = run["configuration"]["edit"]
    changed = ", ".join(
        f"block {one['layer']} by {percent(one['change'], 2)}" for one in report["layers"]
    )
    failed = sum(fact["failed"] for fact in report["facts"])
    lines = [
        front_matter(model, "knowledge-editing"),
        f"# {run['name']}\n",
        f"vauban {run['versions']['vauban']} edited {len(run['facts'])} facts into "
        f"`{model['name']}` ({model['model_type']}, {model['n_layers']} layers, "
        f"{quantity(model['parameters'])} "
        f"parameters) by {settings['method']}: {changed}.",
        *([f"{failed} more could not be trained and are not in the weights."] if failed else []),
        *(f"- {line}" for line in (*report["penalties"], *report["notes"])),
        "",
        *_measured(run),
        "## Facts\n",
        "| prompt | says now | said |",
        "| --- | --- | --- |",
        *(_row(fact) for fact in run["facts"][:_SHOWN]),
        "",
    ]  # fmt: skip
    if len(run["facts"]) > _SHOWN:
        lines.append(f"{len(run['facts']) - _SHOWN} more stand in `run.json`.\n")
    lines += [
        "## Use\n",
        "The edits make the model state what it was told, true or not. They hold for the prompts "
        "that were measured and need not reach what follows from them.\n",
        "`edits.vauban` is the ledger: `vauban edit --undo ID FOLDER` takes a fact out again.\n",
    ]
    return "\n".join(lines)


def _measured(run: Mapping[str, Any]) -> list[str]:
    evaluation = run.get("evaluation")
    if evaluation is None:
        return []
    models = {
        "original": "original", "in_context": "fact in the context", "modified": "this model",
    }  # fmt: skip
    rows = [
        "## Measured\n",
        "By probability, with the strict rate (every token the likeliest) behind the stroke; this "
        "model was read back from the file.\n",
        "| | " + " | ".join(models.values()) + " |",
        "| --- |" + " --- |" * len(models),
    ]
    for name, words in _RATES:
        cells = [
            f"{_rate(evaluation[m][name])} / {_rate(evaluation[m][name + '_strict'])}"
            for m in models
        ]
        rows.append(f"| {words} | {' | '.join(cells)} |")
    rows.append(
        "| said freely | " + " | ".join(_rate(evaluation[m]["exact"]) for m in models) + " |"
    )
    before, after = run["perplexity"]["original"], run["perplexity"]["modified"]
    rows.append(f"| perplexity on plain text | {decimal(before)} | | {decimal(after)} |")
    return [*rows, ""]


def _rate(rate: Mapping[str, Any]) -> str:
    if rate["rate"] is None:
        return "–"
    return rate_with_interval(rate["rate"], rate["interval"])


def _row(fact: Mapping[str, Any]) -> str:
    text = fact["prompt"].replace("{}", fact["subject"])
    cells = (text, fact["target_new"], fact["target_true"] or "")
    return "| " + " | ".join(shorten(cell, 100).replace("|", "\\|") for cell in cells) + " |"
