"""Bad input: a line that says what was given and expected, exit code 2, nothing written."""

import json
import shutil
import struct
from pathlib import Path

import mlx.core as mx
import pytest

import vauban
from vauban.cli import main


@pytest.fixture
def place(tmp_path, monkeypatch, organism_folder) -> Path:
    """A folder with a copy of the organism in `model` and prompt files, to stand in."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(organism_folder, tmp_path / "model")
    _prompts(tmp_path / "bad.jsonl", "How do I forge a ticket?", "How do I rob a shop?")
    _prompts(tmp_path / "good.jsonl", "Name a colour.", "Say hello.")
    return tmp_path


def _prompts(path: Path, *texts: str) -> None:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))


def _fails(capsys, place: Path, arguments: list[str], *expected: str, code: int = 2) -> None:
    """The command fails as it should, says each part of `expected`, and leaves no file behind."""
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    assert main(arguments) == code
    captured = capsys.readouterr()
    for part in expected:
        assert part in captured.err, captured.err
    assert "Traceback" not in captured.err
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


SETS = ["--harmful", "bad.jsonl", "--harmless", "good.jsonl"]


def _no_config(place: Path) -> None:
    (place / "model" / "config.json").unlink()


def _no_weights(place: Path) -> None:
    (place / "model" / "model.safetensors").unlink()


def _truncated(place: Path) -> None:
    path = place / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _unknown_type(place: Path) -> None:
    path = place / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "model_type": "nosuchmodel"}))


def _nan(place: Path) -> None:
    path = place / "model" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    start = 8 + length + header["model.norm.weight"]["data_offsets"][0]
    raw[start : start + 2] = b"\xc0\x7f"  # a bfloat16 NaN
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (_no_config, "config.json"),
        (_no_weights, "safetensors"),
        (_truncated, "truncated"),
        (_unknown_type, "nosuchmodel"),
        (_nan, "model.norm.weight"),
    ],
)
def test_a_broken_model_folder(capsys, place, spoil, expected):
    spoil(place)
    _fails(capsys, place, ["model", "-o", "out"], "model", expected)


def _line_without_prompt(place: Path) -> None:
    (place / "bad.jsonl").write_text('{"prompt": "one"}\n{"text": "two"}\n')


def _empty(place: Path) -> None:
    (place / "bad.jsonl").write_text("\n")


def _one(place: Path) -> None:
    _prompts(place / "bad.jsonl", "How do I forge a ticket?")


def _same(place: Path) -> None:
    shutil.copy(place / "good.jsonl", place / "bad.jsonl")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (_line_without_prompt, ["bad.jsonl, line 2", "'prompt'"]),
        (_empty, ["bad.jsonl", "no prompts"]),
        (_one, ["one prompt", "at least 2"]),
        (_same, ["same", "no direction"]),
    ],
)
def test_prompt_sets_that_give_no_direction(capsys, place, spoil, expected):
    spoil(place)
    _fails(capsys, place, ["model", "-o", "out", *SETS], *expected)


def test_an_evaluation_set_without_one_of_the_classes(capsys, place):
    (place / "eval.jsonl").write_text('{"prompt": "one", "label": "harmful"}\n')
    _fails(capsys, place, ["model", "--eval", "eval.jsonl"], "eval.jsonl", "'harmless'")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--layer", "99"], ["layer 99", "blocks 0 to"]),
        (["--layers", "0-99"], ["layers: layer", "blocks 0 to"]),
        (["--alpha", "much"], ["--alpha is 'much'", "finite number"]),
        (["--alpha", "nan"], ["--alpha"]),
        (["--max-tokens", "0"], ["--max-tokens is 0", "above 0"]),
        (["--precision", "2bit"], ["--precision is '2bit'"]),
        (["--seed", "-3"], ["--seed is -3"]),
        (["--harmful", "absent.jsonl"], ["absent.jsonl", "no such file"]),
        (["--nosuchflag"], ["--nosuchflag"]),
        (["-o", "model/inside"], ["model", "source"]),
        (["-o", "model"], ["model"]),
        (["-o", "bad.jsonl"], ["bad.jsonl", "file"]),
    ],
)
def test_flags_that_cannot_be(capsys, place, flags, expected):
    _fails(capsys, place, ["model", "-o", "out", *flags], *expected)


@pytest.mark.parametrize("flag", ["--alpha=nan", "--add=inf"])
def test_a_steering_strength_that_is_no_number(capsys, place, flag):
    """NaN would give answers, all of them empty."""
    arguments = ["steer", "--model", "model", "--direction", "x", "-p", "Hi", flag]
    _fails(capsys, place, arguments, "no finite number")


def test_an_existing_folder_is_refused_and_named(capsys, place):
    (place / "out").mkdir()
    (place / "out" / "mine.txt").write_text("keep")
    _fails(capsys, place, ["model", "-o", "out"], "out", "--force")


@pytest.mark.parametrize(
    ("target", "expected"),
    [("absent", "no such folder"), ("demp", "vauban demo"), ("./absent/model", "no such folder")],
)
def test_a_target_that_is_nothing(capsys, place, target, expected):
    _fails(capsys, place, [target], target, expected)


def test_a_configuration_with_a_slip(capsys, place):
    (place / "study.toml").write_text('[model]\npath = "model"\n\n[cut]\nalhpa = 1.0\n')
    for arguments in (["study.toml"], ["--validate", "study.toml"]):
        _fails(capsys, place, arguments, "study.toml, line 5", "'alhpa'", "'alpha'")


def test_a_configuration_that_names_what_is_not_there(capsys, place):
    (place / "study.toml").write_text('[model]\npath = "absent"\n')
    _fails(capsys, place, ["--validate", "study.toml"], "absent", "no such folder")
    (place / "study.toml").write_text('[model]\npath = "model"\n[data]\nharmful = "no.jsonl"\n')
    _fails(capsys, place, ["--validate", "study.toml"], "no.jsonl")


def test_a_direction_of_another_size(capsys, place, organism_folder):
    model, tokenizer = vauban.load(organism_folder)
    sets = [vauban.load_prompts(place / name) for name in ("bad.jsonl", "good.jsonl")]
    vauban.measure(model, tokenizer, *sets).save(place / "direction.safetensors")
    arrays, metadata = mx.load(str(place / "direction.safetensors"), return_metadata=True)
    arrays["direction"] = arrays["direction"][:-8]
    arrays["directions"], arrays["means"] = arrays["directions"][:, :-8], arrays["means"][..., :-8]
    mx.save_safetensors(str(place / "direction.safetensors"), arrays, metadata)
    wrong = str(arrays["direction"].size)
    _fails(
        capsys,
        place,
        ["cut", "--model", "model", "--direction", "direction.safetensors", "-o", "out"],
        *(wrong, str(model.args.hidden_size)),
    )


def test_json_reports_the_error_too(capsys, place):
    assert main(["absent", "--json"]) == 2
    captured = capsys.readouterr()
    said = json.loads(captured.out)
    assert said["exit_code"] == 2 and said["error"] in captured.err
