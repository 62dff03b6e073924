"""The notebook is what its script makes of the pages, and runs from top to bottom."""

import json
import runpy
import tempfile
from pathlib import Path

from tests.docs.blocks import ROOT, run_code

NOTEBOOK = ROOT / "docs" / "notebooks" / "first-steps.ipynb"


def test_the_notebook_is_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "generate_notebook.py"))
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert text == script["notebook"](), "run: python docs/generate_notebook.py"


def test_its_pictures_and_links_exist() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    targets = [part.split(")")[0].split("#")[0] for part in text.split("](")[1:]]
    inside = [target for target in targets if not target.startswith("https://")]
    assert len(inside) > 8
    for target in inside:
        assert (NOTEBOOK.parent / target).exists(), target


def test_its_cells_run_from_top_to_bottom(tmp_path: Path, monkeypatch, capsys, environment) -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    # The first cell makes a temporary folder and goes there.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shell = "%%bash\n"
    run_code(
        [
            ("shell" if source.startswith(shell) else "python", source.removeprefix(shell))
            for source in sources
        ],
        NOTEBOOK.name,
        environment,
    )
    assert len(list(tmp_path.glob("*/demo/run.json"))) == 1
