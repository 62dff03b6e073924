"""The study as one HTML page that needs no other file: chart, tables, what directions encode.

Takes study.json as a mapping.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from vauban.report.figures import decimal
from vauban.study.chart import family_chart
from vauban.study.tables import cell, shown_metrics, title

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 3rem; }
.wide { overflow-x: auto; } svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0; }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: right;
         vertical-align: top; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
td small { display: block; color: #666; } .note { color: #555; }
"""


def study_page(document: Mapping[str, Any]) -> str:
    """The whole page of a study."""
    names = ", ".join(block["model"] for block in document["models"])
    body = [
        "<h1>Difference in means and INLP, compared</h1>",
        f"<p>{escape(names)}. vauban {escape(document['versions']['vauban'])}, "
        f"seed {document['configuration']['seed']}. Every rate with its 95 % interval; in brackets "
        "the change from the baseline.</p>",
        f'<div class="wide">{_svg(family_chart(document["models"]))}</div>',
        '<p class="note">Gains are changes with the sign that makes higher better, clipped to '
        "[−1, 1] in this chart only; log-perplexity in nats per token. Stars: the best family.</p>",
    ]
    for block in document["models"]:
        body += _model(block)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>vauban study: {escape(names)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _svg(text: str) -> str:
    return text[text.index("<svg") :]


def _model(block: Mapping[str, Any]) -> Iterable[str]:
    conditions = block["conditions"]
    names = shown_metrics(conditions)
    yield f"<h2>{escape(block['model'])}</h2>"
    rows = []
    for number, condition in enumerate(conditions):
        figures = {figure["name"]: figure for figure in condition["metrics"]}
        cells = [_split_cell(cell(figures[name], change=number > 0)) for name in names]
        rows.append([escape(condition["name"]), *cells])
    yield _table(["condition", *map(title, names)], rows)
    yield "<h3>Where each method takes its direction from</h3>"
    yield _table(
        ["method", "position", "residual", "passed", "bypass", "induce", "KL", "note"],
        [
            [escape(name), str(c["position"]), str(c["residual"]),
             f"{c['passed']} of {c['offered']}",
             *(decimal(c["scores"][s]) for s in ("bypass", "induce", "kl")), escape(c["note"])]
            for name, c in block["choices"].items()
        ],
    )  # fmt: skip
    if block["further"]:
        yield "<h3>What INLP's directions encode</h3>"
        yield _table(
            ["direction", "held-out accuracy", "cosine with the mean difference",
             "AUC harmful", "strongest other label", "AUC", "writes", "writes against"],
            [
                [str(f["index"]), decimal(f["accuracy"]), decimal(f["cosine"]),
                 decimal(f["refusal_auc"]), escape(f["strongest"]),
                 decimal(f["aucs"][f["strongest"]]) if f["strongest"] else "",
                 _tokens(f["writes"]), _tokens(f["writes_against"])]
                for f in block["further"]
            ],
        )  # fmt: skip
    if block["composition"]:
        yield from _composition(block["composition"])
    if block["warnings"]:
        yield "<h3>Warnings</h3><ul>"
        yield from (f"<li>{escape(text)}</li>" for text in block["warnings"])
        yield "</ul>"


def _composition(facts: Mapping[str, Any]) -> Iterable[str]:
    yield "<h3>Composition: the direction measured again after the cuts before it</h3>"
    yield _table(
        ["block", "norm, relative to the first measurement", "cosine with it"],
        [
            [str(row["block"]), _or_dash(row["norm_ratio"]), _or_dash(row["cosine"])]
            for row in facts["layers"]
        ],
    )
    second = facts["second"]
    yield (
        f"<p>After the direction is cut everywhere, {second['norm_ratio']:.1%} of the difference "
        f"at residual {facts['residual']} remains (cosine {second['cosine']:+.2f} with the first); "
        f"it tells held-out prompts apart with an AUC of {second['auc_second']:.3f}, the first "
        f"with {second['auc_first']:.3f}.</p>"
    )


def _or_dash(value: float | None) -> str:
    return "–" if value is None else decimal(value)


def _tokens(tokens: Sequence[str]) -> str:
    return ", ".join(f"<code>{escape(repr(token)[1:-1])}</code>" for token in tokens)


def _split_cell(text: str) -> str:
    """The value on the first line, interval and change below it in small print."""
    value, bracket, rest = text.partition(" [")
    return f"{escape(value)}<small>[{escape(rest)}</small>" if bracket else escape(text)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already; headings are text."""
    head = "".join(f"<th>{escape(h)}</th>" for h in headings)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'
