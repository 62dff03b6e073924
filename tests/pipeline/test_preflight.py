"""What can be known beforehand is told before the model is loaded; what was measured is kept."""

import errno
import importlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

import vauban
from tests.export.checkpoints import save_checkpoint, sharded
from vauban.cli import main
from vauban.config import make_config
from vauban.export import disk, export_bytes
from vauban.models import weight_files
from vauban.pipeline.preflight import open_folder, preflight

run_file = importlib.import_module("vauban.pipeline.run")
SMALL = [
    *("--num-prompts", "6", "--max-tokens", "8", "--no-controls", "--layer", "auto"),
    *("--alpha", "1"),
]


class Loaded(Exception):
    """The model was opened, which these cases must not reach."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in with a copy of the organism in `model`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(vauban.organism_path("dense"), tmp_path / "model")
    return tmp_path


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: Any, **__: Any) -> None:
        raise Loaded

    names = ("pipeline.stages", "pipeline.edit_facts", "cli.single_stages")
    # All are imported before one is changed: the later ones would take the changed name over.
    for module in [importlib.import_module(f"vauban.{name}") for name in names]:
        monkeypatch.setattr(module, "open_model", opened)


def told(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """What the command says on its way out with exit code 2."""
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def verbs(out: str, direction: Path) -> list[list[str]]:
    """The verbs that write a model, each with this output folder."""
    facts = str(vauban.organism_path("facts"))
    return [
        ["model", "-o", out],
        ["demo", "-o", out],
        ["cut", "--model", "model", "--direction", str(direction), "-o", out],
        ["edit", facts, str(Path(facts) / "facts.jsonl"), "-o", out],
    ]


@pytest.fixture
def direction(place: Path) -> Path:
    model, tokenizer = vauban.load("model")
    sets = [vauban.load_prompts(place / "model/prompts" / f"{n}.jsonl")[:8]
            for n in ("harmful", "harmless")]  # fmt: skip
    return vauban.measure(model, tokenizer, *sets).save(place / "mine.safetensors")


@pytest.mark.usefixtures("unloaded")
def test_a_folder_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], place: Path, direction: Path
) -> None:
    (place / "file").write_text("")
    places = [("file/out", "is a file"), ("file/deep/er/out", "is a file")]
    if os.access("/proc/1", os.R_OK):  # even root creates nothing there
        places.append(("/proc/nowhere/out", "cannot be written: /proc:"))
    if os.getuid():
        (place / "closed").mkdir(mode=0o500)
        places.append(("closed/deep/out", "closed: Permission denied"))
    for out, expected in places:
        for arguments in verbs(out, direction):
            said = told(capsys, arguments)
            assert expected in said and "choose another place (-o)" in said, (arguments, said)
    assert not list(place.glob(".*"))


@pytest.mark.usefixtures("unloaded")
def test_a_disk_of_one_megabyte(
    capsys: pytest.CaptureFixture[str],
    place: Path,
    direction: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = SimpleNamespace(free=1_000_000)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: free)
    for arguments in verbs("deep/out", direction):
        said = told(capsys, arguments)
        assert "has 1.0 MB free" in said and " MB and " in said, said
    assert not (place / "deep").exists()
    # The figure is the size of what is written, to what lies beside the weights.
    free.free = 10**9
    needed = preflight(make_config({("model", "path"): "model"})).needed
    weights = sum(f.stat().st_size for f in weight_files(place / "model").files)
    assert weights < needed < weights + 2_000_000


@pytest.mark.parametrize("precision", ["same", "8bit", "float", "adapter"])
@pytest.mark.parametrize("bits", [0, 4])
def test_the_room_that_is_asked_for_is_what_an_export_takes(
    tmp_path: Path, precision: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "SIDE_FILES", 0)
    source = save_checkpoint(tmp_path / "source", "llama", bits=bits)
    plan = vauban.plan_cut(vauban.load(source)[0], mx.ones(64), embedding=False)
    plan.export(source, tmp_path / "out", precision, calibrate=False)
    name = "adapters" if precision == "adapter" else "model"
    written = (tmp_path / "out" / f"{name}.safetensors").stat().st_size
    asked = export_bytes(source, precision)
    # An adapter's header, and scales of half as many bytes, are all that is not counted.
    assert 0.8 * written - 4000 < asked < 1.35 * written + 4000


def test_a_second_table_is_counted(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "qwen3")
    plain, untied = (export_bytes(source, unties=unties) for unties in (False, True))
    assert untied - plain == 160 * 64 * 2
    assert export_bytes(source, "adapter") < plain


@pytest.mark.usefixtures("unloaded")
def test_every_shard_of_thirty_is_looked_at(tmp_path: Path, capsys) -> None:
    single = save_checkpoint(tmp_path / "single", "llama")
    folder = sharded(single, tmp_path / "model", 30)
    assert open_folder(str(folder))[0] == folder
    shard = folder / "model-00023-of-00030.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    assert "model-00023-of-00030.safetensors" in told(capsys, [str(folder)])
    shard.write_bytes(whole)
    index = folder / "model.safetensors.index.json"
    facts = json.loads(index.read_text())
    facts["weight_map"]["model.stray.weight"] = shard.name
    index.write_text(json.dumps(facts))
    assert "names model.stray.weight in model-00023" in told(capsys, [str(folder)])


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("tokenizer.json", '{"version": "1.0", "mod', "tokenizer.json is not JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json holds a list"),
        ("generation_config.json", "{", "generation_config.json is not JSON"),
        ("config.json", "{", "config.json is not JSON"),
        ("prompts/harmful.jsonl", '{"prompt": 3}\n', "harmful.jsonl, line 1"),
        ("prompts/eval.jsonl", '{"prompt": "x"}\n', "eval.jsonl"),
        ("vauban.json", "{", "vauban.json"),
    ],
)
def test_files_of_the_model_that_cannot_be_read(
    capsys, place: Path, name: str, text: str, expected: str
) -> None:
    (place / "model" / name).write_text(text)
    for verb in (["model"], ["measure", "--model", "model"]):
        if "eval" not in name or verb == ["model"]:
            assert expected in told(capsys, [*verb, "-o", "out.safetensors"])
    assert {path.name for path in place.iterdir()} == {"model"}


@pytest.mark.usefixtures("unloaded")
def test_flags_and_sets_that_do_not_fit_the_model(capsys, place: Path, direction: Path) -> None:
    assert "blocks 0 to 5" in told(capsys, ["model", "--layer", "6"])
    assert "blocks 0 to 5" in told(capsys, ["measure", "--model", "model", "--layer", "9"])
    (place / "one.txt").write_text("Name a colour.\n")
    both = ["--harmful", "one.txt", "--harmless", "one.txt"]
    assert "expected at least 2" in told(capsys, ["model", *both])
    other = save_checkpoint(place / "other", "llama")
    for arguments in ([str(other)], ["cut", "--model", str(other)]):
        said = told(capsys, [*arguments, "--direction", str(direction), "-o", "out"])
        assert "6 blocks of width 128" in said and "4 blocks of width 64" in said
    (place / "no.vauban").write_bytes(b"x" * 20)
    assert "no.vauban" in told(capsys, ["model", "--direction", "no.vauban"])
    assert "no direction file" in told(capsys, ["model", "--direction", "absent.vauban"])


def test_what_fails_last_keeps_the_direction_and_a_run_goes_on_from_it(
    capsys, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_file.model_card
    for error in (OSError(errno.ENOSPC, "No space left on device"), vauban.CheckError("no")):

        def full(*_: Any, error: Exception = error) -> str:
            raise error

        monkeypatch.setattr(run_file, "model_card", full)
        assert main(["model", "-o", "deep/out", *SMALL]) == (2 if error.args[0] == 28 else 1)
        said = capsys.readouterr().err
        kept = place / "deep" / "out.direction.vauban"
        assert f"--direction {kept.relative_to(place)}" in said and "nothing was kept" not in said
        assert [path.name for path in (place / "deep").iterdir()] == [kept.name]
    monkeypatch.setattr(run_file, "model_card", whole)
    monkeypatch.setattr(
        run_file, "measure_stage", lambda *_, **__: pytest.fail("the direction was there")
    )
    given = ["--direction", str(kept.relative_to(place))]
    assert main(["model", "-o", "deep/out", *SMALL, *given]) == 0
    assert kept.exists()  # The user named it, so it is the user's.
    result = vauban.DirectionResult.load(place / "deep/out/direction.vauban")
    assert mx.array_equal(result.direction, vauban.DirectionResult.load(kept).direction)
    assert f"go on from {kept.relative_to(place)}" in capsys.readouterr().out
    (place / "again.toml").write_text(
        f'[model]\npath = "model"\n[measure]\ndirection = "{kept.relative_to(place)}"\n'
        "[cut]\nalpha = 1.0\n[eval]\nnum_prompts = 6\nmax_tokens = 8\ncontrols = false\n"
        '[output]\ndir = "again"\n'
    )
    assert main(["again.toml"]) == 0
    hashes = [
        json.loads((place / out / "run.json").read_text())["files"]["written"]
        for out in ("deep/out", "again")
    ]
    assert hashes[0] == hashes[1]


def test_a_run_that_ends_well_leaves_its_folder_alone(place: Path) -> None:
    """The source's own card comes along, and its terms stand in the new one."""
    (place / "model" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The source\n")
    (place / "model" / "model.gguf").write_bytes(b"weights")
    assert main([str(place / "model"), "-o", str(place / "out"), *SMALL]) == 0
    assert {path.name for path in place.iterdir()} == {"model", "out"}
    card = (place / "out" / "README.md").read_text()
    assert card.startswith("---\n") and "\nlicense: apache-2.0" in card.partition("\n---\n")[0]
    assert "not copied: model.gguf" in card
    assert "# The source" in (place / "out" / "SOURCE_README.md").read_text()


def test_doctor_names_what_only_looks_like_weights(capsys, place: Path) -> None:
    (place / "model" / "model.gguf").write_bytes(b"weights")
    shutil.copy(place / "model/model.safetensors", place / "model/consolidated.safetensors")
    assert main(["doctor", "model", "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["model"]["files"]
    assert files["weights"] == ["model.safetensors"]
    assert files["ignored"] == ["consolidated.safetensors", "model.gguf"]


def test_names_that_transformers_does_not_have_are_refused_before_measuring(
    capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_file, "measure_stage", lambda *_, **__: pytest.fail("measured"))
    path = str(vauban.organism_path("4bit"))
    for layers in ("all", "top_k"):
        flags = ["--layout", "hf", "--layers", layers, "-o", str(tmp_path / "out")]
        assert "packed matrix, which transformers" in told(capsys, [path, *flags])
    dense = str(vauban.organism_path("dense"))
    flags = ["--precision", "adapter", "--layout", "hf", "-o", str(tmp_path / "out")]
    assert "an adapter holds no weights" in told(capsys, [dense, *flags])


def test_abliterate_checks_its_folder_before_it_measures(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = importlib.import_module("vauban.quick.abliterate")
    monkeypatch.setattr(quick, "measure_direction", lambda *_: pytest.fail("measured"))
    model, tokenizer = vauban.load("model")
    (place / "file").write_text("")
    with pytest.raises(vauban.InputError, match="is a file"):
        quick.abliterate(model, tokenizer, "model", place / "file" / "out")
