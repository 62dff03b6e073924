"""Put the sections of a real run's card into `model-card.md`, between the page's marks.

    python docs/generate_model_card.py

Runs the pipeline on the bundled organism with the command that the page shows. A section of the
card that the page does not explain is an error, and so is a mark without a section.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

PAGE = Path(__file__).with_name("model-card.md")
OPTIONS = "--gates careful --layer auto --alpha 1 -m 24 --num-prompts 64"
MARK = re.compile(r"<!-- card: (.*?) -->\n.*?<!-- /card -->", re.DOTALL)


def card() -> str:
    """The README.md of a run on the organism."""
    from vauban import organism_path

    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "vauban", str(organism_path("dense")), "-o", "release"]
        subprocess.run([*command, *OPTIONS.split()], cwd=place, check=True, capture_output=True)
        return (Path(place) / "release" / "README.md").read_text(encoding="utf-8")


def sections(text: str) -> dict[str, str]:
    """The parts of a card: its front matter, what stands under the title, and the headings'."""
    found = re.match(r"---\n(.*?)---\n(.*)", text, re.DOTALL)
    if found is None:
        raise ValueError("the card has no front matter")
    head, body = found.groups()
    first, *others = re.split(r"^## ", body, flags=re.M)
    parts = {"front matter": f"---\n{head}---", "title": first.strip()}
    for other in others:
        parts[other.partition("\n")[0]] = f"## {other}".strip()
    return parts


def page(text: str) -> str:
    """The page with the sections of a card in it."""
    parts, written = sections(text), PAGE.read_text(encoding="utf-8")
    marked = [match[1] for match in MARK.finditer(written)]
    if sorted(marked) != sorted(parts):
        raise ValueError(f"{PAGE.name} explains {marked}; the card has {list(parts)}")

    def quoted(match: re.Match[str]) -> str:
        name, inside = match[1], parts[match[1]]
        if name == "front matter":
            shown = textwrap.indent(inside, "    ")
        else:  # as a reader sees it, but for the heading, which is the page's own
            body = re.sub(r"\A# (.*)\n", r"**\1**\n", re.sub(r"\A## .*\n+", "", inside))
            shown = re.sub(r"^", "> ", body, flags=re.M).replace("> \n", ">\n")
        return f"<!-- card: {name} -->\n\n{shown}\n\n<!-- /card -->"

    return MARK.sub(quoted, written)


def main() -> None:
    PAGE.write_text(page(card()), encoding="utf-8")


if __name__ == "__main__":
    main()
