"""`vauban search` as a user meets it: what it prints and writes, and how it ends early."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import vauban
from vauban.cli import main
from vauban.search import SearchResult

FEW = ("--num-prompts", "8", "--max-tokens", "8", "--no-controls")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory, organism_folder: Path) -> list[str]:
    """Flags that name 24 measuring prompts of each class."""
    folder, flags = tmp_path_factory.mktemp("prompts"), []
    for name in ("harmful", "harmless"):
        lines = (organism_folder / "prompts" / f"{name}.jsonl").read_text().splitlines()[:24]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        flags += [f"--{name}", str(folder / f"{name}.jsonl")]
    return flags


@pytest.fixture(scope="module")
def done(run, tmp_path_factory, organism_folder, prompts):
    """One search of the organism; (its folder, the finished process)."""
    folder = tmp_path_factory.mktemp("search")
    flags = ("-o", "out", "--trials", "3", *prompts, *FEW)
    finished = run("search", str(organism_folder), *flags, cwd=folder)
    assert finished.returncode == 0, finished.stderr
    return folder, finished


def test_it_prints_the_front_and_writes_a_run_with_the_best_cut(done):
    folder, finished = done
    text, out = finished.stdout, folder / "out"
    assert "\x1b" not in text and finished.stderr == ""
    document = json.loads((out / "run.json").read_text(encoding="utf-8"))
    result = SearchResult.load(out / "search.json")
    best = result.best()
    assert document["search"]["best"] == best.number and len(result.trials) == 3
    assert f"\n{best.number} * " in text and "that no trial saw" in text
    assert result.rescored is not None and result.rescored.winner == best.number
    assert document["strength"]["trials"][0] == document["search"]["trials"][best.number]
    assert "of 3 trials" in text and "prepare" not in text
    rows = {row["name"]: row for row in document["behaviour"]}
    assert rows["before"]["harmful_refused"]["rate"] >= 0.8
    assert rows["cut"]["harmful_refused"]["rate"] <= 0.25
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"**Search**: trial {best.number} of 3" in card and "`search.json`" in card
    for name in ("search.html", "search.png", "model.safetensors", "direction.vauban"):
        assert (out / name).stat().st_size > 1000
    # What was written is the trial's cut.
    model, _ = vauban.load(str(done[0] / "out"))
    saved = vauban.DirectionResult.load(out / "direction.vauban").direction
    assert (saved - result.direction(best)).abs().max() < 1e-6
    assert len(model.layers) == 6


def test_a_model_that_does_not_refuse_is_told_so(done, prompts, capsys, monkeypatch, tmp_path):
    """The cut model of the first run."""
    monkeypatch.chdir(tmp_path)
    assert main(["search", str(done[0] / "out"), "-o", "again", *prompts, *FEW]) == 0
    assert "there is nothing to search" in capsys.readouterr().out
    assert not (tmp_path / "again").exists()


def test_a_limit_that_no_trial_keeps(done, prompts, organism_folder, capsys, monkeypatch, tmp_path):
    """The three trials of the first run, from its journal; the nearest is named, nothing cut."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(done[0] / "out.journal", "kept.journal")
    flags = ["-o", "out", "--storage", "kept.journal", "--trials", "3", *prompts, *FEW]
    assert main(["search", str(organism_folder), *flags, "--kl-limit", "1e-9"]) == 1
    said = capsys.readouterr()
    assert "going on from kept.journal" in said.out and "3 trials" in said.out
    assert "no trial keeps the first-token KL at 1e-09" in said.err
    assert "the nearest is trial" in said.err and "out.search.json" in said.err
    kept = SearchResult.load(tmp_path / "out.search.json")
    assert kept.trials == SearchResult.load(done[0] / "out" / "search.json").trials
    assert not (tmp_path / "out").exists()
    # A journal of another seed is named and left alone.
    before = Path("kept.journal").read_bytes()
    assert main(["search", str(organism_folder), *flags, "--seed", "1"]) == 2
    assert "belongs to another search" in capsys.readouterr().err
    assert Path("kept.journal").read_bytes() == before


def test_ctrl_c_keeps_and_shows_the_front(environment, prompts, organism_folder, tmp_path, done):
    shutil.copy(done[0] / "out.journal", tmp_path / "out.journal")
    process = subprocess.Popen(
        [sys.executable, "-m", "vauban", "search", str(organism_folder), "-o", "out", "--trials",
         "500", "--json", *prompts, *FEW],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        # The stage before the trials is over.
        if line.startswith("measure "):
            break
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    document = json.loads(printed)
    assert document["stopped"] == "interrupted" and len(document["trials"]) >= 3
    assert "the front of" in said and "the same command goes on from out.journal" in said
    assert SearchResult.load(tmp_path / "out.search.json").stopped == "interrupted"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--objectives", "refused,speed"], "'speed'"),
        (["--trials", "0"], "trials is 0"),
        (["--storage", "."], "is a folder"),
        (["--timeout", "0"], "timeout 0"),
    ],
)
def test_bad_flags(flags, message, organism_folder, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["search", str(organism_folder), "-o", "out", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
