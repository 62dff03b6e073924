"""The report of a run: one file that loads nothing, fits a phone, and says what the run said."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import vauban
from tests.browser import dump
from vauban.cli import main
from vauban.config import make_config
from vauban.errors import InputError
from vauban.pipeline import run
from vauban.report import html_report, write_report
from vauban.report.html_tables import _shape

# What sticks out of the page, what asked for a network, and the colours of both schemes.
_HARNESS = """<pre id="seen"></pre><script>
const wide = [...document.querySelectorAll("body *")].filter((e) =>
  !e.closest(".scroll, pre, svg") && e.getBoundingClientRect().right > innerWidth + 1);
document.getElementById("seen").textContent = JSON.stringify({
  width: innerWidth, outside: wide.map((e) => e.outerHTML.slice(0, 80)),
  requests: performance.getEntriesByType("resource").map((e) => e.name),
  charts: [...document.querySelectorAll("figure svg")].map((e) => e.getBoundingClientRect().height),
  title: document.title, fill: getComputedStyle(document.querySelector("figure svg text")).fill,
});</script>"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "out"
    config = make_config(
        {
            ("model", "path"): str(vauban.organism_path("dense")),
            ("eval", "num_prompts"): 8,
            ("eval", "max_tokens"): 40,
            ("measure", "layer"): 4,
            ("cut", "alpha"): 1.0,
            ("gates", "kl"): "<= 100",
            ("output", "dir"): str(folder),
        }
    )
    run(config)
    return folder


class _Links(HTMLParser):
    """Every address that the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [
            value or "" for name, value in attrs
            if name in ("src", "href", "xlink:href", "srcset", "data", "action")
        ]  # fmt: skip


def test_one_file_that_loads_nothing(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    links = _Links()
    links.feed(page)
    assert all(address.startswith("#") for address in links.addresses)
    assert "url(http" not in page and "@import" not in page and "<script" not in page
    assert len(page) < 3_000_000


@pytest.mark.parametrize("width", [1300, 500])
def test_a_browser_shows_it_whole(finished: Path, tmp_path: Path, width: int) -> None:
    page = (finished / "report.html").read_text().replace("</body>", _HARNESS + "</body>")
    (tmp_path / "page.html").write_text(page)
    text = dump(tmp_path / "page.html", tmp_path / "profile", width)
    written = re.search(r'<pre id="seen">(.*?)</pre>', text, re.S)
    assert written and written[1], "the page's script did not finish"
    seen = json.loads(written[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert seen["width"] == width and seen["outside"] == [] and seen["requests"] == []
    assert len(seen["charts"]) >= 5 and min(seen["charts"]) > 100
    assert seen["title"] == "out: vauban report"
    assert seen["fill"] == "rgb(27, 31, 36)", "texts of a chart have the page's colour"


def test_it_says_the_figures_of_the_run(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    document = json.loads((finished / "run.json").read_text())
    after = document["evaluation"]["refusal_rate_modified"]
    assert f"{after:.1%}" in page and "kl ≤ 100" in page and "passed" in page
    assert document["prompts"]["eval"]["sha256"][:12] in page
    projections = document["projections"]
    assert [len(projections["before"][c]) for c in ("harmful", "harmless")] == [8, 8]
    # α = 1 in every writer, the embedding kept: little of the direction is left in the stream.
    size = {s: max(map(abs, projections[s]["harmful"])) for s in ("before", "after")}
    assert size["after"] < 0.2 * size["before"]


def test_the_projections_are_those_of_the_stream(finished: Path) -> None:
    model, tokenizer = vauban.load(vauban.organism_path("dense"))
    result = vauban.DirectionResult.load(finished / "direction.vauban")
    answers = [json.loads(line) for line in (finished / "answers.jsonl").read_text().splitlines()]
    prompts = [row["prompt"] for row in answers if row["label"] == "harmful"]
    values = vauban.collect_activations(model, tokenizer, prompts, positions=(result.position,))
    along = (values.at(result.residual_index, result.position) @ result.direction).tolist()
    stored = json.loads((finished / "run.json").read_text())["projections"]["before"]["harmful"]
    assert stored == pytest.approx(along, abs=1e-3)


def test_what_a_model_says_is_text(finished: Path) -> None:
    document = json.loads((finished / "run.json").read_text())
    rows = [json.loads(line) for line in (finished / "answers.jsonl").read_text().splitlines()]
    rows[0]["modified"] = "<script>alert(1)</script> & more"
    page = html_report(document, rows[:1])
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page


def test_without_matplotlib_the_tables_stand_alone(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    page = write_report(finished, tmp_path / "plain.html").read_text()
    assert "<svg" not in page and "pip install &#39;vauban[plots]&#39;" in page
    assert "harmful refused" in page


def test_the_verb_makes_it_again(finished: Path, tmp_path: Path, capsys) -> None:
    before = (finished / "report.html").read_bytes()
    assert main(["report", str(finished)]) == 0
    assert (finished / "report.html").read_bytes() == before
    other = tmp_path / "other.html"
    assert main(["report", str(finished), "-o", str(other)]) == 0
    assert other.read_bytes() == before
    assert main(["report", str(finished), "-o", str(other)]) == 2
    assert "--force" in capsys.readouterr().err


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run\.json in it"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_answers_file_that_is_cut_off(finished: Path, tmp_path: Path) -> None:
    for name in ("run.json", "answers.jsonl"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    text = (tmp_path / "answers.jsonl").read_text()
    (tmp_path / "answers.jsonl").write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match=r"answers\.jsonl, line \d+"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_strength_is_said_to_the_hundredth() -> None:
    """1.15 and 1.1 are two strengths; a table once showed one as the other."""
    everywhere = {"peak": 1.15, "centre": None, "width": None, "floor": 1.15}
    around = {"peak": 1.12, "centre": 13.8, "width": 9.6, "floor": 0.0}
    said = _shape({"attention": everywhere, "mlp": around, "embedding": False})
    assert said == "attention 1.15; mlp 1.12 about block 13.8, 0 from 9.6 blocks on"
