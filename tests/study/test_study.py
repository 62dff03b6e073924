"""The study as a user runs it: a configuration in, a folder out, killed and taken up again."""

import html
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

import vauban
from tests.study.guards import guard_tokenizer, random_guard
from vauban.cli import main
from vauban.config import StudyConfig
from vauban.errors import InputError
from vauban.pipeline import PromptSet
from vauban.study import StudyResult, run_study
from vauban.study.journal import Journal
from vauban.study.run_study import _split

SMALL = {
    "methods": ["ablation", "nullspace"],
    "scopes": ["all"],
    "ranks": [1],
    "validation": 8,
    # Refusal is complete at residual 4 of 6, which the default leaves out.
    "prune_layers": 0.1,
    "published": False,
}


def small(output: Path, **sections: Any) -> StudyConfig:
    return StudyConfig.model_validate(
        {
            "study": {"models": [str(vauban.organism_path("dense"))], **SMALL},
            "eval": {"num_prompts": 12, "max_tokens": 24},
            "inlp": {"max_rank": 4},
            "texts": {"limit": 16},
            "output": {"dir": str(output)},
            **sections,
        }
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    return run_study(small(tmp_path_factory.mktemp("study") / "out"))


def figures(block: dict[str, Any], name: str) -> dict[str, Any]:
    condition = next(c for c in block["conditions"] if c["name"].startswith(name))
    return {figure["name"]: figure for figure in condition["metrics"]}


def test_the_folder_is_complete(finished: StudyResult) -> None:
    names = {path.name for path in finished.output_dir.iterdir()}
    assert names == {"study.json", "table.md", "chart.png", "study.html"}
    document = json.loads((finished.output_dir / "study.json").read_text())
    assert document == finished.document
    assert (finished.output_dir / "chart.png").read_bytes().startswith(b"\x89PNG")
    page = (finished.output_dir / "study.html").read_text()
    assert "<svg" in page and "http://" not in page.split("<svg")[0]
    for condition in document["models"][0]["conditions"]:
        assert html.escape(condition["name"]) in page


def test_the_cut_ends_refusal_and_a_flip_at_one_is_the_projection(finished: StudyResult) -> None:
    block = finished.document["models"][0]
    before, cut = figures(block, "baseline"), figures(block, "directional ablation, all")
    assert before["non_refusal_harmful"]["value"] < 0.2 < 0.7 < cut["non_refusal_harmful"]["value"]
    projection, flip = figures(block, "null-space projection (rank"), figures(block, "flip at")
    for name, figure in projection.items():
        if figure["value"] is not None:
            assert flip[name]["value"] == pytest.approx(figure["value"], rel=1e-3), name


def test_every_figure_has_interval_change_and_direction(finished: StudyResult) -> None:
    block = finished.document["models"][0]
    baseline = figures(block, "baseline")
    for condition in block["conditions"]:
        for figure in condition["metrics"]:
            if figure["value"] is None:
                assert figure["reason"] and figure["delta"]["change"] is None
                continue
            low, high = figure["interval"]
            assert low <= figure["value"] <= high
            start = baseline[figure["name"]]["value"]
            change = figure["value"] - start
            assert figure["delta"]["change"] == pytest.approx(change)
            sign = 1 if figure["better"] == "higher" else -1
            assert figure["delta"]["gain"] == pytest.approx(sign * change)
            assert -1 <= figure["delta"]["clipped"] <= 1


def test_what_a_model_cannot_do_is_not_zero(finished: StudyResult) -> None:
    mmlu = figures(finished.document["models"][0], "baseline")["mmlu"]
    assert mmlu["value"] is None and "no lm-eval task" in mmlu["reason"]


def test_benchmarks_are_measured_under_every_condition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval's own task files of the forms of MMLU and ARC, with local data."""
    folder = Path(__file__).parent / "fixtures" / "bench"
    # The task files name their data relative to the working directory.
    monkeypatch.chdir(folder)
    config = small(
        tmp_path / "out",
        study={"models": [str(vauban.organism_path("dense"))], "methods": ["random"]},
        bench={
            "tasks": ["mini_mmlu", "mini_arc_cloze"],
            "num_fewshot": 1,
            "include_path": str(folder),
        },
    )
    block = run_study(config).document["models"][0]
    for name in ("mini_mmlu", "mini_arc_cloze"):
        before, random = (figures(block, c)[name] for c in ("baseline", "random direction"))
        assert before["n"] == random["n"] > 0
        assert before["delta"]["change"] == 0.0
        assert 0.0 <= random["interval"][0] <= random["value"] <= random["interval"][1] <= 1.0


def test_the_stand_in_says_what_it_is(finished: StudyResult) -> None:
    names = [f["name"] for f in finished.document["models"][0]["conditions"][0]["metrics"]]
    assert any(n.startswith("unsafe_harmful (stand-in") for n in names)
    assert "stand-in" in (finished.output_dir / "table.md").read_text()


def test_an_existing_folder_is_not_touched(finished: StudyResult) -> None:
    before = (finished.output_dir / "study.json").read_bytes()
    with pytest.raises(InputError, match="exists"):
        run_study(small(finished.output_dir))
    assert (finished.output_dir / "study.json").read_bytes() == before


CONFIG = """\
[study]
models = [{model!r}]
methods = ["ablation", "nullspace"]
scopes = ["all"]
ranks = [1]
validation = 8
prune_layers = 0.1
published = false
[eval]
num_prompts = 12
max_tokens = 24
[inlp]
max_rank = 4
[texts]
limit = 16
[output]
dir = "out"
"""


def _stopped(file: Path, how: signal.Signals, after: int) -> tuple[int, str]:
    """`vauban study FILE` ended by a signal once its journal holds `after` lines; code, stderr."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vauban", "study", str(file), "--json"],
        cwd=file.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while _journal_lines(file.parent) < after and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, how)
    _, told = process.communicate(timeout=60)
    return process.returncode, told


def _journal_lines(folder: Path) -> int:
    journals = folder.glob(".out.partial-*/.journal.jsonl")
    return sum(path.read_text().count("\n") for path in journals)


def test_a_killed_study_goes_on_where_it_was(
    tmp_path: Path, finished: StudyResult, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Each run takes over what the ones before had finished; the figures are the same."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "study.toml"
    file.write_text(CONFIG.format(model=str(vauban.organism_path("dense"))).replace("'", '"'))
    code, told = _stopped(file, signal.SIGTERM, 4)
    # Like Ctrl-C: the work is kept, and the message says so.
    assert code != 0 and "kept" in told and "goes on from there" in told
    lines = _journal_lines(tmp_path)
    assert lines >= 4
    code, _ = _stopped(file, signal.SIGKILL, lines + 1)
    assert code == -signal.SIGKILL
    assert _journal_lines(tmp_path) > lines and not (tmp_path / "out").exists()
    assert main(["study", str(file), "--json"]) == 0
    said = capsys.readouterr()
    assert "taken over from a run that had stopped" in said.err
    again = json.loads(said.out)["models"][0]
    whole = finished.document["models"][0]
    assert again["conditions"] == whole["conditions"]
    assert again["choices"] == whole["choices"]
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_cut_off_line_of_the_journal_is_done_again(tmp_path: Path) -> None:
    first = Journal(tmp_path, "key")
    assert first.once("a", lambda: 1) == 1
    with (tmp_path / ".journal.jsonl").open("a") as stream:
        stream.write('{"name": "b", "va')
    second = Journal(tmp_path, "key")
    assert second.resumed == 1 and "b" not in second
    assert second.once("a", lambda: 2) == 1 and second.once("b", lambda: 3) == 3
    assert Journal(tmp_path, "key").once("b", lambda: 4) == 3


def test_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One command from the scaffold: init, validate; unknown keys name line and suggestion."""
    file = tmp_path / "s.toml"
    assert main(["init", "--study", str(file), "--model", "organism"]) == 0
    text = file.read_text()
    assert 'models = ["organism"]' in text
    model = str(vauban.organism_path("dense"))
    file.write_text(text.replace('"organism"', json.dumps(model)))
    assert main(["--validate", str(file)]) == 0
    assert "128 prompts" in capsys.readouterr().out
    file.write_text(f'[study]\nmodels = ["{model}"]\nscope = ["all"]\n')
    assert main(["study", str(file)]) == 2
    told = capsys.readouterr().err
    assert "line 3" in told and "'scopes'" in told
    file.write_text(f'[study]\nmodels = ["{model}"]\nmethods = ["ablate"]\n')
    assert main(["study", str(file)]) == 2
    assert "element 1" in capsys.readouterr().err
    file.write_text('[study]\nmodels = ["./nowhere"]\n')
    assert main(["--validate", str(file)]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"harmless": ["How do I bake?", "Name a city."] * 4}}, "at least 8"),
        ({"bench": {"tasks": ["no_such_task"]}}, "no_such_task"),
        ({"guard": {"model": "nowhere"}}, "nowhere"),
        ({"texts": {"plain": "nowhere.jsonl"}}, "nowhere.jsonl"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    sections: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(vauban.VaubanError, match=message):
        run_study(small(tmp_path / "out", **sections))
    assert list(tmp_path.iterdir()) == []


def test_prompts_in_two_sets_are_refused(tmp_path: Path) -> None:
    rows = vauban.load_labelled_prompts(vauban.organism_path("dense") / "prompts" / "eval.jsonl")
    harmful = [row.prompt for row in rows if row.label == "harmful"]
    with pytest.raises(InputError, match="fitted on too"):
        run_study(small(tmp_path / "out", data={"harmful": harmful}))
    own = vauban.load_prompts(vauban.organism_path("dense") / "prompts" / "harmful.jsonl")
    with pytest.raises(InputError, match="both classes"):
        run_study(small(tmp_path / "out", data={"harmless": own}))


def test_a_method_without_candidates_is_left_out_and_said(tmp_path: Path) -> None:
    """No first classifier is perfect on permuted classes; the other methods go on."""
    path = vauban.organism_path("dense")
    mixed = [
        p
        for name in ("harmful", "harmless")
        for p in vauban.load_prompts(path / f"prompts/{name}.jsonl")[:40]
    ]
    config = small(
        tmp_path / "out",
        study={"models": [str(path)], **SMALL, "methods": ["ablation", "flip"]},
        data={"harmful": mixed[::2], "harmless": mixed[1::2]},
        inlp={"min_accuracy": 1.0},
        eval={"num_prompts": 4, "max_tokens": 8},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vauban.VaubanWarning)
        block = run_study(config).document["models"][0]
    assert {c["method"] for c in block["conditions"]} == {"baseline", "ablation", "composition"}
    assert any("nullspace is left out" in text for text in block["warnings"])


def test_a_guard_that_cannot_be_read_is_reported_and_never_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = guard_tokenizer()
    guard = random_guard(tokenizer)
    monkeypatch.setattr("vauban.study.instruments.load", lambda _: (guard, tokenizer))
    config = small(
        tmp_path / "out",
        study={"models": [str(vauban.organism_path("dense"))], "methods": ["random"]},
        # Its files are looked at, and what is loaded is the random guard.
        guard={"model": str(vauban.organism_path("dense")), "min_words": 0},
    )
    block = run_study(config).document["models"][0]
    unsafe = next(
        f for f in block["conditions"][0]["metrics"] if f["name"].startswith("unsafe_harmful")
    )
    assert unsafe["value"] is None and "could be read" in unsafe["reason"]
    assert block["conditions"][0]["guard"]["unparsed"] == 12
    assert any("24 of 24 verdicts could not be read" in text for text in block["warnings"])


def test_the_stand_in_needs_templates(tmp_path: Path) -> None:
    rows = tmp_path / "eval.jsonl"
    lines = [{"prompt": f"Say {i}.", "label": ("harmful", "harmless")[i % 2]} for i in range(20)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match="template"):
        run_study(small(tmp_path / "out", data={"eval": str(rows)}, guard={"model": "stand-in"}))


def test_repeated_prompts_are_left_out_and_said() -> None:
    config = StudyConfig.model_validate({"study": {"models": ["x"], "validation": 4}})
    harmful, harmless = ([f"{word} {i}" for i in range(16)] for word in ("bad", "good"))
    sets = {
        "harmful": PromptSet("list", "configuration", "", (*harmful, "bad 3", "bad 5")),
        "harmless": PromptSet("list", "configuration", "", tuple(harmless)),
    }
    with pytest.warns(vauban.VaubanWarning, match="2 of the 18 harmful prompts are repetitions"):
        fitted, validation = _split(sets, config)
    for label, prompts in (("harmful", harmful), ("harmless", harmless)):
        assert sorted(fitted[label] + validation[label]) == sorted(prompts)
        assert len(validation[label]) == 4
