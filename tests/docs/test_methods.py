"""The methods' pages have one skeleton, and point to lines that are in the code."""

import ast
import importlib
import inspect
import re
import textwrap

import pytest

import vauban
from tests.docs.blocks import ROOT, blocks_of, run_blocks

METHODS = ROOT / "docs" / "methods"
INDEX = METHODS / "index.md"
PAGES = sorted(path for path in METHODS.glob("*.md") if path != INDEX)
HEADINGS = [
    "What it computes",
    "Equation",
    "In the code",
    "When it fails",
    "Cost",
    "Source",
]
# A pointer names a function and quotes the line of it that computes the method.
POINTER = re.compile(r"^- `(vauban\.[\w.]+)`: `(.+)`$", re.M)


def resolved(dotted: str) -> object:
    """The object of a dotted name: the longest module that imports, then attributes."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            value = getattr(value, name)
        return value
    raise AssertionError(f"{dotted} cannot be imported")


def code_lines(value: object) -> list[str]:
    """The lines of a function's body, stripped, without its signature and docstring."""
    source = textwrap.dedent(inspect.getsource(value))
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef), f"{value} is no function"
    documented = ast.get_docstring(function) is not None
    first = function.body[1 if documented and len(function.body) > 1 else 0].lineno
    return [line.strip() for line in source.splitlines()[first - 1 :]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_the_skeleton(page):
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert re.findall(r"^## (.*)$", text, re.M) == HEADINGS
    sections = dict(zip(HEADINGS, re.split(r"^## .*\n", text, flags=re.M)[1:], strict=True))
    assert "$$" in sections["Equation"]
    assert sections["When it fails"].count("\n- **") >= 3, "measured facts, one a bullet"
    assert re.search(r"\d", sections["Cost"]) and re.search(r"\d{4}", sections["Source"])
    code = "".join(block for language, block in blocks_of(page) if language == "python")
    assert "print(" in code and "assert " in code
    assert 60 <= text.count("\n") <= 110


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_quoted_lines_are_in_the_functions(page):
    pointers = POINTER.findall(page.read_text(encoding="utf-8"))
    assert len(pointers) >= 2
    for dotted, line in pointers:
        assert len(line) >= 15, "a line that says something"
        assert line in code_lines(resolved(dotted)), f"{dotted} has no line {line!r}"


def test_a_line_that_is_not_there_is_noticed():
    lines = code_lines(resolved("vauban.directions.mean_estimators.mean_difference"))
    assert lines == ["return high.mean - low.mean"]
    with pytest.raises(AttributeError):
        resolved("vauban.directions.mean_estimators.no_such_function")


def test_the_index_names_every_page_and_functions_that_exist():
    text = INDEX.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "](" in line]
    linked = {re.search(r"\]\((.+?)\)", row)[1] for row in rows}
    assert linked == {page.name for page in PAGES}
    for row in rows:
        names = re.findall(r"`vauban\.(\w+)`", row)
        assert names and all(name in vauban.__all__ for name in names), row
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in [INDEX, *PAGES]:
        assert f": methods/{page.name}\n" in navigation


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch, capsys, environment):
    monkeypatch.chdir(tmp_path)
    run_blocks(page, tmp_path, environment)


def test_links_to_papers_show_the_number_they_go_to():
    link = re.compile(r"\[(\d{4}\.\d{4,5})\]\(https://arxiv\.org/abs/([^)]+)\)")
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md")]
    pairs = [pair for text in pages for pair in link.findall(text)]
    assert len(pairs) > 60
    assert [pair for pair in pairs if pair[0] != pair[1]] == []
