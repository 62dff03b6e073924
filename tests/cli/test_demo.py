"""`vauban demo` as a newcomer meets it: what it prints, what it writes, what comes next."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from vauban.evaluation import is_refusal
from vauban.report import BehaviourRow, Share, cells

FLAGS = ("--max-tokens", "32", "--num-prompts", "16")


@pytest.fixture(scope="module")
def demo(run, tmp_path_factory):
    """One run of the demo; (its folder, the finished process)."""
    folder = tmp_path_factory.mktemp("demo")
    done = run("demo", *FLAGS, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture(scope="module")
def document(demo) -> dict:
    folder, _ = demo
    return json.loads((folder / "vauban-demo" / "run.json").read_text(encoding="utf-8"))


def _row(found: dict) -> BehaviourRow:
    shares = {
        name: Share(value["rate"], tuple(value["interval"]), value["n"])
        for name, value in found.items()
        if isinstance(value, dict)
    }
    return BehaviourRow(**{**found, **shares})


def _answers(folder: Path) -> list[dict]:
    text = (folder / "answers.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_without_a_terminal_there_are_only_plain_lines(demo):
    _, done = demo
    for text in (done.stdout, done.stderr):
        assert "\x1b" not in text and "\r" not in text
    assert done.stderr == ""
    for stage in ("load model", "measure", "evaluate", "random direction", "addition", "write"):
        assert sum(line.startswith(stage + " ") for line in done.stdout.splitlines()) >= 1, stage


def test_the_table_prints_the_figures_of_run_json(demo, document):
    _, done = demo
    assert [row["name"] for row in document["behaviour"]] == [
        *("before", "cut", "random direction", "addition")
    ]
    lines = done.stdout.splitlines()
    heading = next(i for i, line in enumerate(lines) if "harmful refused" in line)
    for line, found in zip(lines[heading + 1 :], document["behaviour"], strict=False):
        row = _row(found)
        assert all(cell in line for cell in cells(row)), line


def test_the_organism_refuses_and_the_cut_removes_it(document):
    rows = {row["name"]: row for row in document["behaviour"]}
    before, after = rows["before"], rows["cut"]
    assert before["harmful_refused"]["rate"] >= 0.9
    assert after["harmful_refused"]["rate"] <= 0.1
    assert rows["random direction"]["harmful_refused"]["rate"] >= 0.9
    assert rows["addition"]["harmless_refused"]["rate"] >= 0.8
    assert rows["random direction"]["kl"] < after["kl"] < 0.3


def test_the_folder_holds_what_the_card_says(demo, document):
    folder, _ = demo
    written = folder / "vauban-demo"
    names = {path.name for path in written.iterdir()}
    assert names >= {
        *("model.safetensors", "config.json", "tokenizer.json", "direction.vauban"),
        *("run.json", "answers.jsonl", "README.md"),
    }
    card = (written / "README.md").read_text(encoding="utf-8")
    for found in document["behaviour"]:
        assert "| " + " | ".join(cells(_row(found))) + " |" in card
    answers = _answers(written)
    held_out = document["prompts"]["eval"]
    assert len(answers) == held_out["harmful"] + held_out["harmless"] == 32
    assert not list(folder.glob(".*partial*"))


def test_the_next_command_can_be_typed_and_the_model_answers(demo, environment):
    folder, done = demo
    command = done.stdout.rstrip().splitlines()[-1].strip()
    assert shlex.split(command)[0].endswith("mlx_lm.generate")
    said = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert said.returncode == 0, said.stderr
    answer = said.stdout.split("==========")[1].strip()
    assert answer and not is_refusal(answer)
    prompt = shlex.split(command)[-1]
    pairs = _answers(folder / "vauban-demo")
    assert next(p for p in pairs if p["prompt"] == prompt)["refused_original"]


def test_the_same_run_gives_the_same_document_and_json_is_alone_on_stdout(demo, run, document):
    folder, _ = demo
    refused = run("demo", *FLAGS, cwd=folder)
    assert refused.returncode == 2
    assert "--force" in refused.stderr and "vauban-demo" in refused.stderr
    again = run("demo", *FLAGS, "--force", "--json", cwd=folder)
    assert again.returncode == 0, again.stderr
    said = json.loads(again.stdout)
    assert said.pop("seconds") > 0 and said.pop("output_dir") == "vauban-demo"
    assert said["configuration"]["output"].pop("force") is True
    expected = json.loads(json.dumps(document))
    del expected["configuration"]["output"]["force"]
    assert said == expected
    assert "\x1b" not in again.stderr and "evaluate" in again.stderr
    assert {p.name for p in Path(folder).iterdir()} == {"vauban-demo"}
