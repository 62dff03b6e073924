"""`probe`, `steer` and `geometry` on saved directions, as a user calls them."""

import json
from pathlib import Path

import pytest

import vauban
from vauban.cli import main

PROMPT = "How do I rob the corner shop?"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Directions of two layers of the dense organism."""
    path = vauban.organism_path("dense")
    model, tokenizer = vauban.load(path)
    harmful = vauban.load_prompts(path / "prompts/harmful.jsonl")
    harmless = vauban.load_prompts(path / "prompts/harmless.jsonl")
    folder = tmp_path_factory.mktemp("directions")
    found = []
    for layer in (1, 3):
        file = folder / f"layer{layer}.safetensors"
        vauban.measure(model, tokenizer, harmful, harmless, layer=layer).save(file)
        found.append(str(file))
    return found


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_probe_projects_every_residual(files: list[str], capsys) -> None:
    model = str(vauban.organism_path("dense"))
    found = document(capsys, "probe", "--model", model, "--direction", files[1], "-p", PROMPT)
    (probe,) = found["probes"]
    opened, tokenizer = vauban.load(model)
    result = vauban.DirectionResult.load(files[1])
    h = vauban.collect_activations(opened, tokenizer, [PROMPT]).values[0, :, 0]
    assert probe["projections"] == pytest.approx((h @ result.direction).tolist(), abs=1e-3)
    assert probe["residual_index"] == 4


def test_probe_shows_every_token(files: list[str], tmp_path: Path, capsys) -> None:
    model = str(vauban.organism_path("dense"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPT}\nName a colour.\n")
    arguments = ("--direction", files[0], "--prompts", str(prompts), "--tokens")
    found = document(capsys, "probe", "--model", model, *arguments)
    assert len(found["scans"]) == 2
    for scan in found["scans"]:
        assert scan["residual_index"] == 2 and len(scan["tokens"]) == len(scan["projections"])


def test_steer_turns_refusal_off_and_on(files: list[str], capsys) -> None:
    model = str(vauban.organism_path("dense"))
    common = ("steer", "--model", model, "--direction", files[1])
    off = document(capsys, *common, "-p", PROMPT)["answers"][0]
    assert vauban.is_refusal(off["before"]) and not vauban.is_refusal(off["steered"])
    on = document(capsys, *common, "-p", "How do I sharpen a pencil?", "--add", "1")["answers"][0]
    assert not vauban.is_refusal(on["before"]) and vauban.is_refusal(on["steered"])


def test_geometry_prints_cosines(files: list[str], capsys) -> None:
    found = document(capsys, "geometry", *files)
    a, b = (vauban.DirectionResult.load(file).direction for file in files)
    assert found["names"] == ["layer1", "layer3"]
    assert found["cosines"][0][1] == pytest.approx(float((a * b).sum()), abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["probe", "--direction", "FILE"], "no prompt is given"),
        (["steer", "--direction", "nowhere.safetensors", "-p", "x"], "nowhere.safetensors"),
        (["geometry", "FILE", "FILE"], "named twice"),
        (["geometry", "FILE"], "at least two"),
    ],
)
def test_bad_input(arguments: list[str], message: str, files: list[str], capsys) -> None:
    given = [files[0] if a == "FILE" else a for a in arguments]
    if given[0] != "geometry":
        given += ["--model", str(vauban.organism_path("dense"))]
    assert main(given) == 2
    assert message in capsys.readouterr().err
