"""The figure of the null-space page, in a real browser: its numbers are NumPy's."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.browser import browser, dump

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "docs" / "assets"
PAGE = ROOT / "docs" / "null-space.md"
VALUES = [
    (0.8, 0.3, 0.6, 0.7),
    (0.0, 0.0, 0.6, 0.7),
    (1.0, 0.0, -0.5, 0.25),
    (-0.37, 0.91, 0.02, -0.88),
    (0.01, 0.0, 1.0, 1.0),
    (0.5, -0.5, -1.0, 1.0),
    (0.3, 0.4, -0.8, 0.6),
    (0.7, -0.2, 0.0, 0.0),
]
# Moves the four sliders as a user does and writes down what the page says.
_HARNESS = """
<pre id="found"></pre>
<script>
addEventListener("load", function () {
  const sliders = ["kx", "ky", "wx", "wy"].map((n) => document.getElementById("ns-" + n));
  const text = (id) => document.getElementById(id).textContent;
  const value = (id) => document.getElementById(id).dataset.value;
  const figure = document.getElementById("null-space-figure");
  const read = () => ({
    before: value("ns-before"), after: value("ns-after"), ratio: value("ns-ratio"),
    projected: value("ns-projected"), shown: text("ns-projected"), shownAfter: text("ns-after"),
    shownRatio: text("ns-ratio"), sentence: text("ns-sentence"), steps: text("ns-steps"),
    label: figure.querySelector("svg").getAttribute("aria-label"),
  });
  const found = { start: read(), moved: [] };
  for (const values of VALUES) {
    values.forEach(function (v, i) {
      sliders[i].value = v;
      sliders[i].dispatchEvent(new Event("input", { bubbles: true }));
    });
    found.moved.push(read());
  }
  found.buttons = [...figure.querySelectorAll("button")].map(function (button) {
    button.click();
    return sliders.map((s) => Number(s.value));
  });
  found.sliders = sliders.map((s) => ({
    type: s.type, tab: s.tabIndex, label: s.labels[0].textContent, disabled: s.disabled,
  }));
  figure.style.width = "320px";
  const edge = figure.getBoundingClientRect().right + 1;
  found.outside = [...figure.querySelectorAll("div, dd, li, input, button, svg")]
    .filter((e) => e.getBoundingClientRect().right > edge).map((e) => e.outerHTML.slice(0, 80));
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the figure says for all VALUES, from one visit."""
    folder = tmp_path_factory.mktemp("page")
    place = re.search(r"^<div id=\"null-space-figure\".*?^</div>", PAGE.read_text(), re.M | re.S)
    assert place, "docs/null-space.md has no place for its figure"
    for name in ("null-space.js", "null-space.css"):
        shutil.copy(ASSETS / name, folder)
    (folder / "page.html").write_text(
        '<!doctype html><meta charset="utf-8"><link rel="stylesheet" href="null-space.css">'
        f'{place[0]}<script src="null-space.js"></script>'
        + _HARNESS.replace("VALUES", json.dumps(VALUES)),
        encoding="utf-8",
    )
    text = dump(folder / "page.html", folder / "profile")
    written = re.search(r"<pre id=\"found\">(.*?)</pre>", text, re.S)
    assert written and written[1], "the page's script did not finish"
    return json.loads(written[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def projected(k: np.ndarray, w: np.ndarray) -> np.ndarray:
    """ΔW (I - K⁺K), by NumPy's pseudo-inverse; that of a zero K is zero."""
    return w @ (np.eye(2) - np.linalg.pinv(k[None]) @ k[None])


@pytest.mark.parametrize("i", range(len(VALUES)), ids=[str(v) for v in VALUES])
def test_the_numbers_are_those_of_numpy(found: dict[str, Any], i: int) -> None:
    said = found["moved"][i]
    k, w = np.array(VALUES[i][:2]), np.array(VALUES[i][2:])
    kept = projected(k, w)
    assert np.allclose([float(x) for x in said["projected"].split(",")], kept, atol=1e-12)
    assert np.isclose(float(said["before"]), k @ w, atol=1e-12)
    assert abs(float(said["after"])) < 1e-12 and said["shownAfter"] == "0.000"
    if w.any():
        ratio = np.linalg.norm(kept) / np.linalg.norm(w)
        assert np.isclose(float(said["ratio"]), ratio, atol=1e-12)
        assert said["shownRatio"] == f"{ratio:.3f}"
    else:
        assert said["ratio"] == "" and said["shownRatio"] == "–"


def test_the_example_of_the_text(found: dict[str, Any]) -> None:
    for said in (found["start"], found["moved"][0]):
        assert said["shown"] == "[−0.16, 0.42]" and said["before"].startswith("0.69")
        for part in ("0.480 + 0.210 = 0.690", "0.690 / 0.730 = 0.945", "[−0.156, 0.416]"):
            assert part in said["steps"]
        assert "keeps 48 %" in said["sentence"] and "[−0.16, 0.42]" in said["label"]


def test_a_zero_key_preserves_nothing(found: dict[str, Any]) -> None:
    said = found["moved"][1]
    assert said["shown"] == "[0.60, 0.70]" and float(said["ratio"]) == 1.0
    assert "nothing is preserved" in said["sentence"] and "whole plane" in said["steps"]
    assert "NaN" not in json.dumps(found) and "Infinity" not in json.dumps(found)


def test_sliders_have_labels_and_take_the_keyboard(found: dict[str, Any]) -> None:
    assert [s["label"] for s in found["sliders"]] == ["K, x", "K, y", "ΔW, x", "ΔW, y"]
    assert all(s["type"] == "range" and s["tab"] == 0 for s in found["sliders"])
    assert found["buttons"][0] == [0.8, 0.3, 0.6, 0.7] and [0, 0, 0.6, 0.7] in found["buttons"]


def test_nothing_sticks_out_on_a_phone(found: dict[str, Any]) -> None:
    assert found["outside"] == []


def test_nothing_comes_from_elsewhere() -> None:
    for name in ("null-space.js", "null-space.css"):
        text = (ASSETS / name).read_text(encoding="utf-8")
        outside = set(re.findall(r"https?://[^\s\"')]+|@import|url\(", text))
        assert outside <= {"http://www.w3.org/2000/svg"}


def test_the_figure_stands_on_the_built_page(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is not installed: no page to look at")
    browser()
    subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--quiet",
            "--no-strict",
            "-d",
            tmp_path / "site",
        ],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        check=True,
        capture_output=True,
        timeout=240,
    )
    text = dump(tmp_path / "site" / "null-space" / "index.html", tmp_path / "profile")
    assert re.search(r'id="ns-projected"[^>]*>\[−0\.16, 0\.42\]<', text)
