"""The code of the pages on editing runs as it is printed."""

import pytest

from tests.docs.blocks import ROOT, run_blocks


@pytest.mark.parametrize("page", ["editing.md", "null-space.md"])
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_blocks(ROOT / "docs" / page, tmp_path)
