"""Puts the tables and the charts of finished studies into docs/study.md, between its marks.

    vauban study docs/study/organism.toml
    vauban study docs/study/real-model.toml
    python docs/generate_study_page.py study-organism study-real-model

Parts of models that are in none of the given folders stay as they are.

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
ASSETS = DOCS / "assets"


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
        facts = block["composition"] or {"layers": []}
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
    """`page` with every marked part that was found replaced."""

    def put(match: re.Match[str]) -> str:
        if match[1] not in found:
            return match[0]
        return f"<!-- {match[1]} -->\n\n{found[match[1]]}\n\n<!-- /{match[1]} -->"

    return re.sub(r"<!-- ([\w .-]+) -->\n.*?<!-- /\1 -->", put, page, flags=re.DOTALL)


def _table(headings: list[str], rows: list[list[Any]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main(folders: list[Path]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    for folder in folders:
        document = json.loads((folder / "study.json").read_text(encoding="utf-8"))
        page = fill(page, parts(document))
        chart = Path(document["configuration"]["output"]["dir"]).with_suffix(".png").name
        shutil.copyfile(folder / "chart.png", ASSETS / chart)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
