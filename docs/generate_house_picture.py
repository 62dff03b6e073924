"""Draw the rooms of the package and the way of the data: docs/assets/house-{light,dark}.svg.

    python docs/generate_house_picture.py

The rooms and their order are those that tests/test_rooms.py enforces; the words beside them are the
first lines of their __init__ docstrings, so that the picture cannot say something else.
"""

import ast
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ORDER = (
    *("prompts", "interventions", "claims", "models", "generation", "activations", "directions"),
    *("rounding", "edits", "knowledge", "evaluation", "search", "export", "comparison", "report"),
    *("config", "pipeline", "study", "quick", "cli"),
)
# (from, to, what travels, margin): the way of the data, beside the imports.
DATA = (
    ("prompts", "models", "tokens", "left"),
    ("models", "activations", "residuals", "left"),
    ("activations", "directions", "class means", "left"),
    ("directions", "edits", "a direction", "left"),
    ("edits", "evaluation", "a plan, tried", "left"),
    ("edits", "export", "a plan", "right"),
    ("export", "report", "read back", "left"),
    ("evaluation", "report", "figures", "far right"),
)
COLOURS = {
    "light": dict(ink="#1b2b2a", faint="#5b6b69", box="#e4f2f0", line="#00897b", page="#ffffff"),
    "dark": dict(ink="#e8f0ef", faint="#9db0ae", box="#21393a", line="#4db6ac", page="#1e2129"),
}
ROW, TOP, LEFT, WIDTH, RIGHT = 42, 46, 126, 690, 92


def first_line(room: str) -> str:
    """The first sentence of a room's docstring, without its full stop."""
    page = ROOT / "vauban" / room / "__init__.py"
    text = ast.get_docstring(ast.parse(page.read_text(encoding="utf-8"))) or ""
    return text.splitlines()[0].partition(". ")[0].rstrip(".")


def draw(theme: str) -> str:
    """The picture as SVG text: a row per room, arrows of the data in the left margin."""
    c = COLOURS[theme]
    height = TOP + ROW * len(ORDER) + 16
    middle = {room: TOP + ROW * i + 15 for i, room in enumerate(ORDER)}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + RIGHT} {height}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="100%" height="100%" fill="{c["page"]}"/>',
        f'<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{c["line"]}"/></marker>'
        "</defs>",
        f'<text x="{LEFT}" y="26" fill="{c["faint"]}">The rooms of vauban/: each imports only from '
        "those above it. Arrows: the way of the data.</text>",
    ]
    for room in ORDER:
        y = middle[room]
        parts += [
            f'<rect x="{LEFT}" y="{y - 15}" width="{WIDTH}" height="32" rx="5" fill="{c["box"]}"/>',
            f'<text x="{LEFT + 12}" y="{y + 6}" fill="{c["ink"]}" font-weight="600">{room}</text>',
            f'<text x="{LEFT + 122}" y="{y + 6}" fill="{c["ink"]}" font-size="12">'
            f"{escape(first_line(room))}</text>",
        ]
    for start, end, word, margin in DATA:
        top, bottom = middle[start] + 9, middle[end] - 5
        edge, step, anchor = (LEFT, -1, "end") if margin == "left" else (LEFT + WIDTH, 1, "start")
        x = edge + step * (30 if margin == "far right" else 18)
        y = {"left": (top + bottom) / 2 + 4, "right": top + 18, "far right": bottom - 8}[margin]
        parts += [
            f'<path d="M{edge + 2 * step} {top} H{x} V{bottom} H{edge + 4 * step}" fill="none" '
            f'stroke="{c["line"]}" stroke-width="1.6" marker-end="url(#head)"/>',
            f'<text x="{x + 6 * step}" y="{y}" text-anchor="{anchor}" font-size="12" '
            f'fill="{c["faint"]}">{word}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def pictures() -> dict[Path, str]:
    """Every file that the script writes, with its text."""
    return {ROOT / "docs" / "assets" / f"house-{theme}.svg": draw(theme) for theme in COLOURS}


if __name__ == "__main__":
    for path, text in pictures().items():
        path.write_text(text, encoding="utf-8")
        sys.stdout.write(f"wrote {path}\n")
