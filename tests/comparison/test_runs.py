"""Two run folders side by side: figures, pairs over the common prompts, files that are cut off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vauban.cli import main
from vauban.comparison import compare_runs
from vauban.errors import InputError
from vauban.evaluation import paired_test


def write_run(folder: Path, refused: dict[str, bool], *, kl: float = 0.01, model="m") -> Path:
    """A run folder as a run writes it: harmful prompts with their verdicts, one harmless."""
    folder.mkdir()
    rows = [
        {"label": "harmful", "prompt": p, "refused_modified": r, "degenerate_modified": False}
        for p, r in refused.items()
    ]
    rows.append({"label": "harmless", "prompt": "Say hi.", "refused_modified": None,
                 "degenerate_modified": False})  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "answers.jsonl").write_text(text, encoding="utf-8")
    evaluation = {
        "refusal_rate_modified": sum(refused.values()) / len(refused),
        "kl_divergence": kl,
        "num_prompts": len(refused),
        "num_harmless": 1,
        "perplexity_original": 2.0,
        "perplexity_modified": 3.0,
        "intervals": {"kl_divergence": [kl / 2, kl * 2]},
    }
    document = {"model": {"name": model}, "evaluation": evaluation}
    (folder / "run.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def test_the_common_prompts_are_tested_in_pairs_and_counted(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {f"p{i}": i < 8 for i in range(12)}, kl=0.02)
    b = write_run(tmp_path / "b", {f"p{i}": i < 2 for i in range(3, 20)}, kl=0.01, model="other")
    result = compare_runs(a, b)
    common = range(3, 12)
    assert result.paired["refusal"] == paired_test([i < 8 for i in common], [False] * 9)
    assert result.common == {"harmful": 9, "harmless": 1}
    assert (result.only_a, result.only_b) == (3, 8)
    assert result.paired["harmless_refused"] is None  # no verdict on either side
    assert result.paired["degenerate"] is not None and result.paired["degenerate"].n == 10
    figures = {pair.name: pair for pair in result.figures}
    assert figures["kl"].better == figures["refusal"].better == "b"
    assert figures["kl"].a.interval == (0.01, 0.04)
    assert (
        figures["harmful_prompts"].better == "b" and figures["perplexity_ratio"].a.estimate == 1.5
    )
    assert figures["perplexity_ratio"].better is None  # equal
    notes = " ".join(result.notes)
    assert "share 10 prompts; 3 are in a alone, 8 in b alone" in notes and "m and other" in notes


def test_an_answers_file_that_is_cut_off_is_named_with_its_line(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {"p": True, "q": False})
    b = write_run(tmp_path / "b", {"p": True, "q": False})
    file = b / "answers.jsonl"
    whole = file.read_text()
    file.write_text(whole[:-20])
    with pytest.raises(InputError, match=r"b/answers\.jsonl, line 3: the file is cut off inside"):
        compare_runs(a, b)
    file.write_text("".join(whole.splitlines(keepends=True)[:2]))
    with pytest.raises(InputError, match=r"line 2: the file ends after 2 answers and run\.json"):
        compare_runs(a, b)
    file.write_text(whole.replace('"prompt"', '"text"'))
    with pytest.raises(InputError, match=r"line 1: no key 'prompt'"):
        compare_runs(a, b)
    file.unlink()
    result = compare_runs(a, b)
    assert result.paired["refusal"] is None and "figures stand alone" in result.notes[0]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {"p": True})
    with pytest.raises(InputError, match=r"no run\.json"):
        compare_runs(a, tmp_path)
    edited = tmp_path / "edited"
    edited.mkdir()
    (edited / "run.json").write_text('{"kind": "edit", "evaluation": {}}')
    with pytest.raises(InputError, match="no refusal rates"):
        compare_runs(edited, a)


def test_the_verb_prints_both_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / name, {"p": name == "a", "q": True}) for name in "ab"]
    assert main(["compare", *map(str, runs)]) == 0
    out = capsys.readouterr().out
    assert "lower is better" in out and "1 of 2 only in a, 0 only in b" in out
    assert main(["compare", *map(str, runs), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["common"] == {"harmful": 2, "harmless": 1}
    assert main(["compare", str(runs[0]), str(tmp_path / "none")]) == 2
