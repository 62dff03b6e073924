"""The page on the model card shows the card of a run, and its checks run."""

import re
import runpy

from tests.docs.blocks import ROOT, run_blocks


def shape_of(text: str) -> str:
    """A page with its numbers masked: another machine's figures may differ in a digit."""
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "0", text)


def test_the_page_shows_a_runs_card_and_its_checks_run(tmp_path, environment, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "model-card.md"
    run_blocks(page, tmp_path, environment)
    script = runpy.run_path(str(ROOT / "docs" / "generate_model_card.py"))
    card = (tmp_path / "release" / "README.md").read_text(encoding="utf-8")
    assert shape_of(page.read_text(encoding="utf-8")) == shape_of(script["page"](card)), (
        "run: python docs/generate_model_card.py"
    )
    assert "harmful refused" in card and len(script["sections"](card)) >= 7
    assert script["OPTIONS"] in page.read_text(encoding="utf-8")
