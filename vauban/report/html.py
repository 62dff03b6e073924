"""One HTML file for a run: figures, charts, samples, configuration. Opens offline, loads nothing.

Reads what a run folder holds (run.json, answers.jsonl, search.json), so that a report can be made
again years later. Without matplotlib (extra `plots`) it holds the tables alone, and says so.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from vauban.comparison.run_folder import ANSWERS_FILE, SEARCH_FILE, read_answers, read_run
from vauban.report import html_charts
from vauban.report.figures import (
    cuts_all,
    decimal,
    percent,
    quantity,
    rate_with_interval,
    shorten,
)
from vauban.report.html_tables import candidate_table, strength_table
from vauban.report.samples import pick_samples
from vauban.report.table import HEADINGS, BehaviourRow, Share, cells, contrast_line
from vauban.report.verdict_table import off_target_sentence, verdict_sentences

_WIDTH, _SAMPLES = 220, 6
_PAGE = Path(__file__).with_name("page.html")
_NO_CHARTS = "The charts need matplotlib: pip install 'vauban[plots]', then `vauban report` again."
_HOW = (
    "Brackets hold 95% intervals: Wilson for rates, bootstrap over answers for perplexity and KL. "
    "Degenerate answers are those to harmful prompts, in the addition row to how-to requests."
)
_RULES = {
    "phrases": "Verdicts by phrases in their place (`classify_answer`); no judge read the answers.",
    "judge": "The unchanged model was asked whether an answer refuses, and was not checked.",
}


def html_report(
    run: Mapping[str, Any],
    answers: Sequence[Mapping[str, Any]],
    search: Mapping[str, Any] | None = None,
) -> str:
    """The page of a run.

    Args:
        run: the run document, with the keys of `run.json`.
        answers: the rows of `answers.jsonl`, of which few are shown, cut short.
        search: the document of `search.json`, where the run was a search.
    """
    rows = [_row(row) for row in run["behaviour"]]
    drawn, missing = _charts(run, search)
    environment = Environment(autoescape=True, trim_blocks=True)
    return environment.from_string(_PAGE.read_text(encoding="utf-8")).render(
        run=run,
        lead=_lead(run),
        tiles=_tiles(run),
        gates=_gates(run),
        headings=HEADINGS,
        table=[cells(row) for row in rows],
        how=_HOW,
        sentences=[
            *verdict_sentences(run["evaluation"]),
            *_contrast(rows),
            *filter(None, [off_target_sentence(run.get("off_target"))]),
        ],
        charts=drawn,
        missing=missing,
        tables=[*candidate_table(run), *strength_table(run)],
        samples=_samples(answers),
        ruled=_rule(run),
        sets=_sets(run["prompts"]),
        versions=_versions(run),
        configuration=json.dumps(run["configuration"], indent=2, ensure_ascii=False),
    )


def _row(row: Mapping[str, Any]) -> BehaviourRow:
    """A row of the run document as the value that the table prints."""
    shares = ("harmful_refused", "harmless_refused", "contrast_refused")
    known = {name: row[name] and Share(**row[name]) for name in shares}
    return BehaviourRow(**{**row, **known})


def _lead(run: Mapping[str, Any]) -> str:
    model, direction, export = run["model"], run["direction"], run["export"]
    return (
        f"{direction['method'].replace('_', ' ')} at the output of block "
        f"{direction['layer_index']} of {model['name']} ({model['model_type']}, "
        f"{model['n_layers']} blocks, {quantity(model['parameters'])} parameters), cut from "
        f"{export['modules_edited']} residual writers"
    )


def _tiles(run: Mapping[str, Any]) -> list[dict[str, str]]:
    evaluation, export = run["evaluation"], run["export"]
    intervals = evaluation["intervals"]

    def change(name: str, label: str) -> dict[str, str]:
        before, after = evaluation[f"{name}_original"], evaluation[f"{name}_modified"]
        if before is None or after is None:
            return {"name": label, "value": "–", "note": "no answer has a verdict"}
        note = rate_with_interval(after, intervals[f"{name}_modified"])
        return {"name": label, "value": f"{percent(before)} → {percent(after)}", "note": note}

    count, whole = export["modules_edited"], cuts_all(export)
    left = export["direction_left"] if whole else max(export["missed"].values())
    tiles = [
        change("refusal_rate", "harmful prompts refused"),
        change("over_refusal", "harmless prompts refused"),
        {
            "name": "direction left" if whole else "away from the planned cut",
            "value": decimal(left, 2),
            "note": f"worst of {count} writers, read back",
        },
    ]
    if evaluation["kl_divergence"] is not None:
        low_high = intervals["kl_divergence"]
        ends = "–".join(decimal(end, 2) for end in low_high) if low_high else "one answer:"
        ends += " nats a token, all answer tokens"
        kl = decimal(evaluation["kl_divergence"], 2)
        tiles.insert(2, {"name": "KL on harmless answers", "value": kl, "note": ends})
    return tiles


def _gates(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for result in (run.get("gates") or {}).get("results", ()):
        gate, end, compared = result["gate"], result["end"], result["compared"]
        of = "" if end in (None, "estimate") else f" ({end} end of the interval)"
        sign = "≤" if gate["direction"] == "at_most" else "≥"
        rows.append(
            {
                "bound": f"{gate['figure']} {sign} {gate['bound']:g}{of}",
                "value": result["why"] if compared is None else decimal(compared),
                "ok": result["passed"],
            }
        )
    return rows


def _charts(
    run: Mapping[str, Any], search: Mapping[str, Any] | None
) -> tuple[list[dict[str, Any]], str]:
    """(captions with pictures, what is missing)."""
    if importlib.util.find_spec("matplotlib") is None:
        return [], _NO_CHARTS
    evaluation, direction = run["evaluation"], run["direction"]
    answers = direction["provenance"].get("answers") or {}
    curve = evaluation["length_curve"]
    charts: list[tuple[Any, str, Callable[[], str]]] = [
        (
            run.get("projections"),
            "Held-out prompts along the direction, where it was measured",
            lambda: html_charts.projections(run["projections"]),
        ),
        (
            direction["scores"],
            "How far the classes are apart, by block",
            lambda: html_charts.separation(direction),
        ),
        (
            answers.get("shortlist"),
            "The shortlist (residual, position) by short answers under the cut",
            lambda: html_charts.candidates(
                answers["shortlist"], (answers["layer"], answers["position"])
            ),
        ),
        (
            "verdicts_original" in evaluation,
            "Verdicts on the answers to harmful prompts",
            lambda: html_charts.verdicts(
                evaluation["verdicts_original"], evaluation["verdicts_modified"]
            ),
        ),
        (
            len(curve) > 1,
            "Refusals, when answers are cut to so many tokens",
            lambda: html_charts.length_curve(curve),
        ),
        (
            run["export"]["writers"],
            "Share of the direction left, or turned round, in each writer, read back from the file",
            lambda: html_charts.leak_per_writer(run["export"]["writers"]),
        ),
        (
            search,
            "The search: every finished trial",
            lambda: html_charts.front(
                (search or {})["trials"], (search or {})["front"], run["search"]["best"]
            ),
        ),
        *_surface(run.get("surface") or {}),
    ]
    drawn = [{"caption": c, "svg": Markup(make())} for there, c, make in charts if there]
    return drawn, ""


def _surface(surface: Mapping[str, Any]) -> list[tuple[Any, str, Callable[[], str]]]:
    """The refusal surface's maps, before and after side by side."""
    charts: list[tuple[Any, str, Callable[[], str]]] = []
    sides = [(f", {side}", surface[side]) for side in ("before", "after") if side in surface]
    for number in range(len(sides[0][1]["maps"]) if sides else 0):
        for name, scan in sides:
            one = scan["maps"][number]
            caption = f"Refused by {' and '.join(one['axes'])}{name} (share, answers)"
            charts.append((one["cells"], caption, partial(_map, one)))
    return charts


def _map(one: Mapping[str, Any]) -> str:
    """The cells of two axes as a heat map; one below the minimum size has no rate."""
    values = [list(dict.fromkeys(cell["values"][a] for cell in one["cells"])) for a in one["axes"]]
    values[1].sort(key=lambda value: (isinstance(value, str), value))
    rates = [[float("nan")] * len(values[1]) for _ in values[0]]
    counts = [[0] * len(values[1]) for _ in values[0]]
    for cell in one["cells"]:
        i, j = (v.index(cell["values"][a]) for v, a in zip(values, one["axes"], strict=True))
        counts[i][j] = cell["judged"]
        if cell["rate"] is not None:
            rates[i][j] = cell["rate"]
    rows, columns = ([str(value).replace("_", " ") for value in side] for side in values)
    return html_charts.heat_map(rows, columns, rates, counts)


def _contrast(rows: Sequence[BehaviourRow]) -> list[str]:
    line = contrast_line(rows)
    return [line[0].upper() + line[1:] + "."] if line else []


def _samples(answers: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Few answers of the harmful and the harmless prompts, the changed ones first."""
    labels = ("harmful", "harmless")
    known = {label: [row for row in answers if row["label"] == label] for label in labels}
    return [
        {
            "label": sample.label,
            "prompt": shorten(_prompt(sample.prompt), _WIDTH),
            "before": shorten(sample.original, _WIDTH) or "(empty)",
            "after": shorten(sample.modified, _WIDTH) or "(empty)",
            "before_verdict": sample.verdicts[0],
            "after_verdict": sample.verdicts[1],
        }
        for sample in pick_samples(known, _SAMPLES)
    ]


def _rule(run: Mapping[str, Any]) -> str:
    """Who said what a refusal is, and how far phrases and judge agree."""
    settings, kappa = run["configuration"]["eval"], run["evaluation"].get("kappa")
    judge = settings.get("judge")
    rule = f"Judged by {judge}, which passed the packaged answers." if judge else ""
    rule = rule or _RULES[settings["refusal_mode"]]
    return rule if kappa is None else f"{rule} κ with the phrases: {kappa:.2f}."


def _prompt(prompt: Any) -> str:
    """A prompt as text; of a conversation its last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _sets(prompts: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = []
    for name, one in prompts.items():
        count = one.get("count") or ", ".join(
            f"{one[kind]} {kind}" for kind in ("harmful", "harmless", "how_to", "contrast")
            if one.get(kind)
        )  # fmt: skip
        rows.append((name, str(one["source"]), str(count), str(one["sha256"])[:12]))
    return rows


def _versions(run: Mapping[str, Any]) -> str:
    parts = [f"{name} {number}" for name, number in run["versions"].items()]
    return f"{', '.join(parts)}; {run['platform']['device']}; seed {run['seeds']['run']}"


def write_report(folder: str | Path, target: str | Path | None = None) -> Path:
    """Write the report of a run folder; `target` is its path, else report.html in the folder.

    Raises InputError for a folder that holds no run, or damaged files.
    """
    place = Path(folder)
    run = read_run(place)
    answers = read_answers(place, run) if (place / ANSWERS_FILE).is_file() else []
    search = None
    if run.get("search"):
        search = json.loads((place / SEARCH_FILE).read_text(encoding="utf-8"))
    path = Path(target) if target is not None else place / "report.html"
    path.write_text(html_report(run, answers, search), encoding="utf-8")
    return path
