"""The code of the pages on directions, interventions and edits runs as it is printed."""

import pytest

from tests.docs.blocks import ROOT, run_blocks


@pytest.mark.parametrize(
    "page", ["directions.md", "interventions.md", "editing.md", "null-space.md"]
)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch, capsys, environment):
    monkeypatch.chdir(tmp_path)
    run_blocks(ROOT / "docs" / page, tmp_path, environment)
