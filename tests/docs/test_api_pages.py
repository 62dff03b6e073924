"""The API's pages name every public name, and each says what it does, with its source of truth."""

import doctest
import importlib.util
import inspect
from pathlib import Path

import pytest

import vauban
from vauban import quick

DOCS = Path(__file__).resolve().parents[2] / "docs"


def _script():
    spec = importlib.util.spec_from_file_location("api_pages", DOCS / "generate_api_pages.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_up_to_date() -> None:
    written = {path.name: path.read_text() for path in (DOCS / "reference" / "api").glob("*.md")}
    assert written == _script().pages(), "run: python docs/generate_api_pages.py"


def test_every_public_name_stands_on_one_page() -> None:
    text = "".join(_script().pages().values())
    for name in vauban.__all__:
        assert text.count(f".{name}\n") >= 1, name


CALLABLE = sorted(
    [(vauban, name) for name in vauban._HOME] + [(quick, name) for name in quick.__all__],
    key=lambda pair: pair[1],
)


@pytest.mark.parametrize(("owner", "name"), CALLABLE, ids=[name for _, name in CALLABLE])
def test_every_public_name_says_what_it_does(owner, name: str) -> None:
    value = getattr(owner, name)
    if not callable(value):  # a constant: its page shows the value
        return
    text = inspect.getdoc(value)
    assert text and not text.startswith(f"{name}("), "a docstring of its own, not dataclass's"
    first = text.split("\n\n")[0]
    assert len(first) > 15 and first.rstrip()[-1] in ".:"


def test_examples_and_fields_of_docstrings_are_rendered_as_shown() -> None:
    pytest.importorskip("griffe", reason="the pages are made where mkdocstrings is installed")
    path = DOCS / "doctest_blocks.py"
    spec = importlib.util.spec_from_file_location("doctest_blocks", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = doctest.testmod(module)
    assert result.attempted >= 2 and not result.failed
    prose = "Two spaces.  They end a sentence\nhere, and name no field."
    assert module.listed(prose) == prose
