"""Write the pages of `reference/api`: every public name, with mkdocstrings' directive for each.

    python docs/generate_api_pages.py

Knows names and where they are defined; the text is the docstrings'.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import vauban
from vauban import quick

FOLDER = Path(__file__).with_name("reference") / "api"
# Page: (title, rooms whose public names it lists).
PAGES = {
    "prompts": ("Prompts", ("vauban.prompts",)),
    "models": (
        "Models and the forward pass",
        ("vauban.models", "vauban.generation", "vauban.activations"),
    ),
    "interventions": ("Interventions", ("vauban.interventions",)),
    "directions": ("Directions", ("vauban.directions",)),
    "edits": ("Edits and export", ("vauban.edits", "vauban.export")),
    "evaluation": ("Evaluation", ("vauban.evaluation", "vauban.comparison")),
    "search": ("Choice and search", ("vauban.search",)),
    "knowledge": ("Knowledge editing", ("vauban.knowledge",)),
    "errors": ("Errors", ("vauban.errors",)),
}


def place(name: str, owner: object = vauban) -> str:
    """The dotted path at which a public name is defined.

    >>> place("measure")
    'vauban.search.measure.measure'
    """
    value = getattr(owner, name)
    if inspect.ismodule(value):  # a room that can be called like its function
        value = type(value).__call__
    module = getattr(value, "__module__", None)
    if module is None or not module.startswith("vauban"):  # a constant
        module = vauban._HOME[name]
    return f"{module}.{name}"


def pages() -> dict[str, str]:
    """The text of every page, by file name."""
    texts = {}
    for file, (title, rooms) in PAGES.items():
        homes = {**vauban._HOME, **{name: f"vauban.{name}" for name in vauban._CALLABLE}}
        names = sorted(
            (name for name, room in homes.items() if _room(room) in rooms), key=str.casefold
        )
        texts[f"{file}.md"] = _page(title, [place(name) for name in names])
    lines = sorted(quick.__all__, key=str.casefold)
    texts["quick.md"] = _page("One-liners: vauban.quick", [place(n, quick) for n in lines])
    return texts


def _room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def _page(title: str, places: list[str]) -> str:
    return f"# {title}\n\n" + "\n".join(f"::: {one}\n" for one in places)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
