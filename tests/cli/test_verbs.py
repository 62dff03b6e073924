"""The smaller verbs: help, init, validate, doctor, and the single stages one after the other."""

import contextlib
import json
import os
import pty
import shlex
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest

import vauban
from vauban.cli import main
from vauban.cli.parsers import GROUPS, VERBS, main_parser, verb_parser


@pytest.fixture(autouse=True)
def _stand_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_no_arguments_gives_three_commands_to_copy(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("  vauban ") for line in lines) == 3


def test_a_reader_that_leaves_early_ends_it_quietly(environment):
    command = f"{shlex.quote(sys.executable)} -m vauban --help | head -n 1; echo ${{PIPESTATUS[0]}}"
    said = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60
    )
    assert said.stderr == "" and said.stdout.startswith("usage: vauban")


def test_an_encoding_without_greek_letters_is_no_error(environment, tmp_path):
    for name in ("bad", "good"):
        (tmp_path / f"{name}.txt").write_text(f"{name} α\n", encoding="utf-8")
    (tmp_path / "α.toml").write_text('[model]\npath = "org/name"\n[data]\nharmful = "bad.txt"\n')
    said = subprocess.run(
        [sys.executable, "-m", "vauban", "--validate", "α.toml"],
        cwd=tmp_path,
        env={**environment, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert said.returncode == 0 and "?.toml is valid" in said.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(capsys, verb):
    assert main([verb, "--help"]) == 0
    assert f"vauban {verb}" in capsys.readouterr().out


def test_init_then_validate(capsys, tmp_path, organism_folder):
    assert main(["init", "study.toml", "--model", str(organism_folder)]) == 0
    assert "vauban --validate study.toml" in capsys.readouterr().out
    assert main(["--validate", "study.toml"]) == 0
    said = capsys.readouterr().out
    assert "is valid" in said and "128 prompts" in said
    assert main(["init", "study.toml"]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["--validate", "study.toml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["configuration"]["cut"]["alpha"] == "auto"


def test_a_configuration_is_run_relative_to_its_file_and_flags_win(
    capsys, tmp_path, organism_folder
):
    study = tmp_path / "study"
    study.mkdir()
    sets = organism_folder / "prompts"
    (study / "safe.jsonl").write_bytes((sets / "harmless.jsonl").read_bytes())
    (study / "study.toml").write_text(
        f'[model]\npath = "{organism_folder}"\n[data]\nharmless = "safe.jsonl"\n'
        "[cut]\nalpha = 0.5\n[eval]\nnum_prompts = 4\nmax_tokens = 8\ncontrols = false\n"
        '[output]\ndir = "result"\n'
    )
    assert main(["study/study.toml", "--alpha", "0.75"]) == 0
    said = capsys.readouterr().out
    assert "cut α = 0.75" in said and "128 harmless (safe.jsonl)" in said
    run = json.loads((study / "result" / "run.json").read_text(encoding="utf-8"))
    assert run["configuration"]["cut"]["alpha"] == 0.75
    assert run["export"]["direction_left"] == pytest.approx(0.25, abs=0.02)


def test_doctor_shows_machine_and_writers(capsys, organism_folder):
    assert main(["doctor", str(organism_folder)]) == 0
    said = capsys.readouterr().out
    assert "mlx-lm" in said and "down_proj" in said and "o_proj" in said
    assert main(["doctor", str(organism_folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    layers = {writer["layer"] for writer in found["model"]["writers"]}
    assert layers == set(range(-1, found["model"]["info"]["n_layers"]))
    assert found["model"]["forward"]["ok"]


def test_doctor_lists_what_of_the_configuration_is_not_taken_up(capsys, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(vauban.organism_path("dense"), folder)
    config = json.loads((folder / "config.json").read_text())
    base = config.pop("rope_theta")
    parameters = {"rope_type": "default", "rope_theta": base}
    config |= {"num_experts": 1, "logit_scale": 0.5, "rope_parameters": parameters}
    config |= {"sliding_window": 9, "use_sliding_window": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(vauban.errors.VaubanWarning, match="sliding_window"):
        assert main(["doctor", str(folder)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: config.json sets" in said
    assert "not taken up: logit_scale = 0.5" in said
    assert "sliding_window = 9" in said and "texts of more than 9 tokens" in said


def test_measure_takes_the_estimator_and_automatic_clipping(capsys, organism_folder, tmp_path):
    given = ["measure", "--model", str(organism_folder), "--layer", "2", "--json", "-o"]
    cures = ["--method", "masked_mean_difference", "--clip-quantile", "auto"]
    assert main([*given, str(tmp_path / "masked.safetensors"), *cures]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["method"] == "masked_mean_difference"
    assert measured["provenance"]["masked"] == {}
    assert measured["provenance"]["clip_chosen"] == "auto"
    assert main([*given, str(tmp_path / "other.safetensors"), "--method", "masked"]) == 2
    assert "variance_scaled" in capsys.readouterr().err
    assert main([*given, str(tmp_path / "other.safetensors"), "--clip-quantile", "auot"]) == 2
    assert "auto" in capsys.readouterr().err


def test_doctor_tells_of_loud_coordinates(capsys, organism_folder, tmp_path):
    """Predicted from the weights and seen on a few prompts, in words and in JSON."""
    assert main(["doctor", str(organism_folder)]) == 0
    assert capsys.readouterr().out.count("no loud coordinate") == 2
    shutil.copytree(organism_folder, tmp_path / "loud")
    file = tmp_path / "loud" / "model.safetensors"
    weights = mx.load(str(file))
    weights["model.layers.1.mlp.down_proj.weight"][96] *= 1500.0
    mx.eval(weights)
    file.unlink()
    mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})
    assert main(["doctor", str(tmp_path / "loud")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "no loud coordinate" not in said
    assert "coordinate 96 (blocks 1)" in said and "coordinate 96 in residuals 2–6" in said
    assert "--clip-quantile auto" in said
    assert main(["doctor", str(tmp_path / "loud"), "--json"]) == 0
    loud = json.loads(capsys.readouterr().out)["model"]["loud"]
    assert [(one["layer"], one["coordinate"]) for one in loud["weights"]] == [(1, 96)]
    assert {(one["residual"], one["coordinate"]) for one in loud["activations"]} == {
        (residual, 96) for residual in range(2, 7)
    }
    assert loud["prompts"] == 16 and loud["unread_writers"] == []


def test_a_terminal_gets_a_panel_and_colours(environment, organism_folder):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "vauban", "doctor", str(organism_folder)],
        env={**environment, "TERM": "xterm-256color", "COLUMNS": "80"},
        stdout=theirs,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    said = b""
    # Reading fails on Linux once the other side is closed: that is the end of the output.
    with contextlib.suppress(OSError):
        while piece := os.read(ours, 65536):
            said += piece
    _, errors = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0 and errors == b""
    text = said.decode()
    assert "╭─" in text and "this machine" in text and "\x1b[" in text and "down_proj" in text


def test_measure_cut_evaluate_one_after_the_other(capsys, organism_folder, tmp_path):
    model = ["--model", str(organism_folder)]
    assert main(["measure", *model, "-o", "refusal.safetensors"]) == 0
    said = capsys.readouterr().out
    assert " *" in said and "vauban cut" in said
    assert main(["measure", *model, "-o", "refusal.safetensors"]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["cut", *model, "--direction", "refusal.safetensors", "-o", "out"]) == 0
    capsys.readouterr()
    limits = ["--max-tokens", "24", "--num-prompts", "12"]
    assert main(["evaluate", *model, "--modified", "out", *limits, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["refusal_rate_original"] >= 0.9
    assert figures["refusal_rate_modified"] <= 0.2
    assert figures["num_prompts"] == 12


def test_every_verb_stands_in_one_group() -> None:
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(VERBS)


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_fits_a_terminal_of_80_columns(verb: str | None, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = (verb_parser(verb) if verb else main_parser()).format_help()
    assert max(map(len, text.splitlines())) <= 80


def test_a_slip_in_a_verb_is_no_model(capsys) -> None:
    from vauban.cli import main

    assert main(["mesure", "--model", "x"]) == 2
    assert "did you mean `vauban measure`?" in capsys.readouterr().err
    assert main(["no-such-model-folder"]) == 2
    assert "did you mean" not in capsys.readouterr().err
