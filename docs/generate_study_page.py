"""Puts the tables and the chart of a finished study into docs/study.md, between its marks.

    vauban study docs/study/organism.toml -o study-organism
    python docs/generate_study_page.py study-organism

The prose around them is written by hand and has to be read again after that.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from vauban.study.tables import study_table

DOCS = Path(__file__).parent
PAGE = DOCS / "study.md"
CHART = DOCS / "assets" / "study-organism.png"


def parts(document: dict[str, Any]) -> dict[str, str]:
    """The generated parts of the page by the name of their mark."""
    found = {}
    for block in document["models"]:
        name = block["model"]
        found[f"conditions {name}"] = study_table(block, markdown=True).partition("\n")[2].strip()
        found[f"choices {name}"] = _table(
            ["method", "position", "residual", "passed", "bypass", "induce", "KL"],
            [
                [method, c["position"], c["residual"], f"{c['passed']} of {c['offered']}",
                 *(f"{c['scores'][s]:.3g}" for s in ("bypass", "induce", "kl"))]
                for method, c in block["choices"].items()
            ],
        )  # fmt: skip
        found[f"further {name}"] = _table(
            ["direction", "accuracy", "cosine with v", "AUC harmful", "strongest other label",
             "AUC", "writes"],
            [
                [f["index"], f"{f['accuracy']:.2f}", f"{f['cosine']:+.2f}",
                 f"{f['refusal_auc']:.2f}", f["strongest"], f"{f['aucs'][f['strongest']]:.2f}",
                 " ".join(f"`{token.strip()}`" for token in f["writes"] if token.strip())]
                for f in block["further"]
            ],
        )  # fmt: skip
        facts = block["composition"]
        found[f"composition {name}"] = _table(
            ["block", "norm left", "cosine"],
            [
                [row["block"], *("–" if row[k] is None else f"{row[k]:.2f}"
                                 for k in ("norm_ratio", "cosine"))]
                for row in facts["layers"]
            ],
        )  # fmt: skip
    return found


def fill(page: str, found: dict[str, str]) -> str:
    """`page` with every marked part replaced; KeyError for a mark without a part."""

    def put(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n\n{found[match[1]]}\n\n<!-- /{match[1]} -->"

    return re.sub(r"<!-- ([\w ]+) -->\n.*?<!-- /\1 -->", put, page, flags=re.DOTALL)


def _table(headings: list[str], rows: list[list[Any]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main(folder: Path) -> None:
    document = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), parts(document)), encoding="utf-8")
    CHART.parent.mkdir(exist_ok=True)
    shutil.copyfile(folder / "chart.png", CHART)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
