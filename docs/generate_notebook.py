"""Write docs/notebooks/first-steps.ipynb: parts 1 and 2 of the course as cells.

    python docs/generate_notebook.py

Text and code are the pages' own, without the exercises. Shell blocks become %%bash cells.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COURSE = ROOT / "docs" / "course"
PAGES = ("1-residual-stream.md", "2-first-run.md")
NOTEBOOK = ROOT / "docs" / "notebooks" / "first-steps.ipynb"
FENCE = re.compile(r"^```(\w+)\n(.*?)\n```$", re.MULTILINE | re.DOTALL)
PLACE = """import os
import tempfile

os.chdir(tempfile.mkdtemp())  # what the cells write lands in a folder of its own
os.environ.pop("MPLBACKEND", None)  # commands draw their charts without Jupyter"""


def cells() -> list[tuple[str, str]]:
    """(kind, source) of every cell, kind "markdown" or "code"."""
    made = [
        (
            "markdown",
            "# First steps\n\nParts 1 and 2 of the course, made from its pages by "
            "`docs/generate_notebook.py`. The exercises and their solutions are on the pages: "
            "[part 1](../course/1-residual-stream.md), [part 2](../course/2-first-run.md). "
            "Start Jupyter in the environment that vauban is installed in.",
        ),
        ("code", PLACE),
    ]
    for page in PAGES:
        text = (COURSE / page).read_text(encoding="utf-8").split("\n## Exercises\n")[0]
        end = 0
        for block in FENCE.finditer(text):
            made.append(("markdown", prose(text[end : block.start()])))
            language, code = block.groups()
            made.append(("code", f"%%bash\n{code}" if language == "shell" else code))
            end = block.end()
        made.append(("markdown", prose(text[end:])))
    return [(kind, source) for kind, source in made if source]


def prose(text: str) -> str:
    """A page's text with the light pictures alone and its links as seen from the notebook."""
    text = re.sub(r"^!\[.*#only-dark\)\n", "", text, flags=re.MULTILINE)
    text = text.replace("#only-light)", ")")
    return re.sub(r"\]\((\d-[\w-]+\.md)", r"](../course/\1", text).strip()


def notebook() -> str:
    """The notebook as a file holds it (nbformat 4.5), without outputs."""
    made = []
    for number, (kind, source) in enumerate(cells()):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        made.append({**cell, "source": source.splitlines(keepends=True)})
    document = {
        "cells": made,
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(document, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    NOTEBOOK.parent.mkdir(exist_ok=True)
    NOTEBOOK.write_text(notebook(), encoding="utf-8")
    sys.stdout.write(f"wrote {NOTEBOOK}\n")
