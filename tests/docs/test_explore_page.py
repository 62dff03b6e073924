"""The figures of the page "Explore", in a real browser: they say what was measured."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from tests.browser import dump

ASSETS = Path(__file__).resolve().parents[2] / "docs" / "assets"
PLACES = "".join(
    f'<div id="explore-{name}" class="explore"></div>'
    for name in ("directions", "strengths", "front")
)
# Moves the sliders as a user does, and writes down what the figures say.
_HARNESS = """
<pre id="said"></pre>
<script>
addEventListener("load", function () {
  const host = (name) => document.getElementById("explore-" + name);
  const set = (input, value) => {
    input.value = value;
    input.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const said = { separation: [], strengths: [] };
  const [layer, alpha] = host("directions").querySelectorAll("input");
  const choice = host("directions").querySelector("select");
  for (const position of Object.keys(EXPLORER.projections)) {
    choice.value = position;
    choice.dispatchEvent(new Event("change"));
    for (const [block, taken] of [[0, 0], [4, 0], [4, 0.5], [4, 2]]) {
      set(layer, block);
      set(alpha, taken);
      said.separation.push([position, block, taken,
        Number(document.getElementById("explore-separation").dataset.auc),
        host("directions").querySelectorAll("circle").length]);
    }
  }
  const strength = host("strengths").querySelector("input");
  EXPLORER.strengths.forEach((row, i) => {
    set(strength, i);
    said.strengths.push([...host("strengths").querySelectorAll("dd")].map((e) => e.textContent));
  });
  const best = host("front").querySelector("circle[r='8']");
  best.dispatchEvent(new Event("click"));
  said.trial = document.getElementById("explore-trial").textContent;
  said.requests = performance.getEntriesByType("resource").map((e) => e.name)
    .filter((name) => !name.startsWith("file:"));
  document.getElementById("said").textContent = JSON.stringify(said);
});
</script>
"""


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    text = (ASSETS / "explorer-data.js").read_text()
    loaded = json.loads(text.removeprefix("const EXPLORER = ").rstrip(";\n"))
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("explore")
    for name in ("explorer.js", "explorer-data.js", "explorer.css"):
        shutil.copy(ASSETS / name, folder)
    (folder / "page.html").write_text(
        '<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="explorer.css">'
        f'{PLACES}<script src="explorer-data.js"></script><script src="explorer.js"></script>'
        f"{_HARNESS}"
    )
    text = dump(folder / "page.html", folder / "profile")
    written = re.search(r'<pre id="said">(.*?)</pre>', text, re.S)
    assert written and written[1], "the page's script did not finish"
    return json.loads(written[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def test_the_separation_is_scikit_learns(said: dict[str, Any], data: dict[str, Any]) -> None:
    for position, block, taken, area, dots in said["separation"]:
        layer = data["projections"][position]["layers"][block]
        values = np.array(layer["harmful"] + layer["harmless"]) * (1 - taken)
        truth = [1] * len(layer["harmful"]) + [0] * len(layer["harmless"])
        assert area == pytest.approx(roc_auc_score(truth, values), abs=1e-9)
        assert dots == len(values)


def test_the_strengths_are_those_that_were_measured(said: dict[str, Any], data) -> None:
    for texts, row in zip(said["strengths"], data["strengths"], strict=True):
        assert texts[0] == f"{100 * row['refused']:.1f} %" and texts[3] == f"{row['kl']:.4f}"


def test_a_point_of_the_front_tells_its_settings(said: dict[str, Any], data) -> None:
    best = next(trial for trial in data["search"] if trial["best"])
    assert said["trial"].startswith(f"Trial {best['number']} (the one that is exported)")
    assert all(name in said["trial"] for name in best["parameters"])


def test_nothing_is_fetched(said: dict[str, Any]) -> None:
    assert said["requests"] == []
