"""`--precision adapter`: a run whose folder holds a LoRA adapter in place of a checkpoint."""

import hashlib
import json
import shlex
import subprocess

import mlx_lm
import pytest

import vauban
from tests.export.checkpoints import save_checkpoint
from vauban.cli import main
from vauban.config import make_config
from vauban.evaluation import is_refusal
from vauban.pipeline import run as run_pipeline

LIMITS = ["--max-tokens", "24", "--num-prompts", "12"]


@pytest.fixture(scope="module")
def source():
    return vauban.organism_path("4bit")


@pytest.fixture(scope="module")
def adapted(run, source, tmp_path_factory):
    """(the folder one stands in, the finished run of the 4-bit organism, its document)."""
    place = tmp_path_factory.mktemp("adapter")
    (place / "run.toml").write_text(
        f'[model]\npath = "{source}"\n[measure]\nlayer = "auto"\n'
        "[cut]\nalpha = 1\nembedding = true\n",
        encoding="utf-8",
    )
    flags = ["--precision", "adapter", "--no-controls", "-o", "out"]
    done = run("run.toml", *flags, *LIMITS, cwd=place)
    assert done.returncode == 0, done.stderr
    return place, done, json.loads((place / "out" / "run.json").read_text(encoding="utf-8"))


def test_the_folder_holds_the_adapter_and_the_records_and_no_weights(adapted):
    place, done, document = adapted
    names = {path.name for path in (place / "out").iterdir()}
    assert names == {
        *("adapters.safetensors", "adapter_config.json", "README.md"),
        *("direction.vauban", "run.json", "answers.jsonl", "report.html"),
    }
    for name in ("adapters.safetensors", "adapter_config.json"):
        digest = hashlib.sha256((place / "out" / name).read_bytes()).hexdigest()
        assert document["files"]["written"][name] == digest
    assert "model.safetensors" in document["files"]["source"]
    assert "write an adapter to out" in done.stdout


def test_what_was_evaluated_is_what_the_folder_does(adapted):
    _, _, document = adapted
    export = document["export"]
    assert export["precision"] == "adapter" and export["modules_edited"] == 13
    assert export["direction_left"] <= 1e-5 and export["logits_difference"] <= 1e-4
    before, after = document["behaviour"]
    assert before["harmful_refused"]["rate"] >= 0.9 and after["harmful_refused"]["rate"] <= 0.1


def test_a_shared_embedding_is_cut_and_the_run_says_what_that_costs(adapted):
    place, done, document = adapted
    assert document["configuration"]["cut"]["embedding"] is True
    assert document["cut"]["embedding"] == "tied" and document["leak"]["whole"]
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("warning: an adapter")]
    assert f"{document['leak']['head_kl']:.4f}" in said
    card = (place / "out" / "README.md").read_text(encoding="utf-8")
    assert said.removeprefix("warning: ") in card


def test_the_next_command_can_be_typed_and_answers(adapted, source, environment):
    place, done, _ = adapted
    command = done.stdout.rstrip().splitlines()[-1].strip()
    words = shlex.split(command)
    assert words[words.index("--model") + 1] == str(source)
    assert words[words.index("--adapter-path") + 1] == "out"
    answers = []
    for typed in (command, command.replace("--adapter-path out ", "")):
        said = subprocess.run(
            typed, shell=True, cwd=place, env=environment, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
        assert said.returncode == 0, said.stderr
        answers.append(said.stdout.split("==========")[1].strip())
    assert answers[0] and not is_refusal(answers[0]) and is_refusal(answers[1])


def test_the_code_of_the_card_runs(adapted, monkeypatch, capsys):
    place, _, _ = adapted
    monkeypatch.chdir(place)
    card = (place / "out" / "README.md").read_text(encoding="utf-8")
    assert "`adapters.safetensors`" in card and "edit.vauban" not in card
    code = card.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert "LoRAEmbedding" in {type(m).__name__ for m in names["model"].modules()}
    assert capsys.readouterr().out.strip()


def test_cut_writes_one_that_evaluate_opens_and_force_replaces_a_whole_folder(
    adapted, source, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    direction = str(adapted[0] / "out" / "direction.vauban")
    cut = ["cut", "--model", str(source), "--direction", direction, "-o", "out"]
    assert main(cut) == 0 and (tmp_path / "out" / "model.safetensors").is_file()
    capsys.readouterr()
    assert main([*cut, "--precision", "adapter"]) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*cut, "--precision", "adapter", "--force"]) == 0
    said = capsys.readouterr().out
    assert "embedding kept" in said
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "adapters.safetensors",
        "adapter_config.json",
    }
    command = shlex.split(said.rstrip().splitlines()[-1])
    assert command[:2] == ["vauban", "evaluate"]
    assert main([*command[1:], *LIMITS, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["refusal_rate_original"] >= 0.9 and figures["refusal_rate_modified"] <= 0.1
    other = str(vauban.organism_path("moe"))
    assert main(["evaluate", "--model", other, "--modified", "out"]) == 2
    assert "with the adapter out" in capsys.readouterr().err
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    assert main(["evaluate", "--model", str(source), "--modified", "out"]) == 2
    assert "with the adapter out" in capsys.readouterr().err


def test_a_model_whose_cut_no_adapter_holds_is_refused_before_it_is_measured(tmp_path):
    source = save_checkpoint(tmp_path / "source", "llama_bias")
    stages: list[str] = []
    values = {
        ("model", "path"): str(source),
        ("output", "dir"): str(tmp_path / "out"),
        ("output", "precision"): "adapter",
    }
    with pytest.raises(vauban.InputError, match="has a bias"):
        run_pipeline(make_config(values), progress=lambda stage, *_: stages.append(stage))
    assert "verify forward pass" in stages and "measure" not in stages
    assert not (tmp_path / "out").exists()


def test_blocks_chosen_by_their_scores_leave_the_embedding_and_head_alone(tmp_path):
    source = vauban.organism_path("dense")
    result = run_pipeline(
        make_config(
            {
                ("model", "path"): str(source),
                ("measure", "layer"): "auto",
                ("cut", "layers"): "above_median",
                ("cut", "alpha"): 1.0,
                ("eval", "controls"): False,
                ("eval", "num_prompts"): 4,
                ("eval", "max_tokens"): 8,
                ("output", "dir"): str(tmp_path / "out"),
                ("output", "precision"): "adapter",
            }
        )
    )
    assert result.document["cut"]["embedding"] == "kept"
    assert "head_kl" not in result.document["leak"]
    model, _ = mlx_lm.load(str(source), adapter_path=str(tmp_path / "out"))
    changed = {p for p, m in model.named_modules() if "lora_a" in m}
    assert changed == {writer["path"] for writer in result.document["cut"]["writers"]}
