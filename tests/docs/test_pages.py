"""The code of the pages on directions, interventions and edits runs as it is printed."""

import runpy

import pytest

from tests.docs.blocks import ROOT, run_blocks


@pytest.mark.parametrize(
    "page",
    [
        "directions.md",
        "interventions.md",
        "editing.md",
        "search.md",
        "diff.md",
        "null-space.md",
        "knowledge.md",
        "verdicts.md",
        "gates.md",
        "surface.md",
        "house.md",
        "faq.md",
        "wrong-input.md",
    ],
)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch, capsys, environment):
    monkeypatch.chdir(tmp_path)
    run_blocks(ROOT / "docs" / page, tmp_path, environment)


def test_the_picture_of_the_rooms_is_up_to_date():
    script = runpy.run_path(str(ROOT / "docs" / "generate_house_picture.py"))
    for path, text in script["pictures"]().items():
        assert path.read_text(encoding="utf-8") == text, "run python docs/generate_house_picture.py"
