"""What is read before rounding when nobody has said: the prompts of the model's own folder."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

import vauban
from vauban.config.schema import OutputSection
from vauban.edits import reading
from vauban.errors import InputError
from vauban.export.record import read_edit_record
from vauban.models import folder_of


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PROMPTS", 2)


@pytest.fixture
def packed() -> Any:
    return vauban.load(vauban.organism_path("4bit"))[0]


def plan_of(model: Any) -> vauban.EditPlan:
    """The embedding and one block: enough to see, and quick."""
    return vauban.plan_cut(model, mx.random.normal((128,), key=mx.random.key(2)), layers=[2])


def facts(folder: Path) -> tuple[Any, list[str]]:
    record = read_edit_record(folder)[1]
    return record["settings"].get("calibration"), record["notes"]


def weights(path: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(path / "model.safetensors")))


def test_an_export_and_an_edit_in_memory_read_the_folders_prompts(
    packed: Any, tmp_path: Path
) -> None:
    """Both the same codes, other ones than without; and as if the prompts had been given."""
    source = vauban.organism_path("4bit")
    plan = plan_of(packed)
    assert plan.export(source, tmp_path / "read").ok
    read, notes = facts(tmp_path / "read")
    assert read["prompts"] == 4 and not any("alike" in n for n in notes)
    assert "calibration" not in plan.settings
    assert plan.export(source, tmp_path / "alike", calibrate=False).ok
    assert facts(tmp_path / "alike")[0] is None
    tokenizer = vauban.load(source)[1]
    prompts = [
        p
        for name in ("harmful", "harmless")
        for p in vauban.load_prompts(source / f"prompts/{name}.jsonl")[:2]
    ]
    assert plan.calibrated(tokenizer, prompts).export(source, tmp_path / "given").ok
    written, alike, given = (weights(tmp_path / n) for n in ("read", "alike", "given"))
    applied = dict(plan.apply(copy.deepcopy(packed)).named_modules())
    for update in plan.updates:
        name = f"{update.path}.weight"
        assert mx.array_equal(written[name], given[name]), name
        assert mx.array_equal(written[name], applied[update.path].weight), name
    assert any(not mx.array_equal(written[n], alike[n]) for n in written)


def test_a_model_that_was_opened_lazily_is_read_like_any_other(tmp_path: Path) -> None:
    """What else is in memory says nothing about a model, so it must not decide what is written."""
    source = vauban.organism_path("4bit")
    model, _ = load_model(source, lazy=True)
    assert folder_of(model) is None
    assert plan_of(model).export(source, tmp_path / "out").ok
    read, notes = facts(tmp_path / "out")
    assert read is not None and not notes


def test_without_a_tokenizer_of_its_own_an_export_says_so(packed: Any, tmp_path: Path) -> None:
    source = tmp_path / "bare"
    shutil.copytree(vauban.organism_path("4bit"), source)
    for file in source.glob("tokenizer*"):
        file.unlink()
    plan = plan_of(packed)
    assert plan.export(source, tmp_path / "out").ok
    read, notes = facts(tmp_path / "out")
    assert read is None and any("has no tokenizer" in n for n in notes)
    with pytest.raises(InputError, match="no tokenizer, so nothing can be read"):
        plan.export(source, tmp_path / "asked", calibrate=True)
    assert not (tmp_path / "asked").exists()


def test_a_tokenizer_of_a_larger_vocabulary_is_not_used(packed: Any, tmp_path: Path) -> None:
    source = tmp_path / "other"
    shutil.copytree(vauban.organism_path("4bit"), source)
    file = source / "tokenizer.json"
    tokens = json.loads(file.read_text())
    for token in tokens["added_tokens"]:
        token["id"] += 5000
    vocabulary = tokens["model"]["vocab"]
    for token in tokens["added_tokens"]:
        vocabulary[token["content"]] = token["id"]
    file.write_text(json.dumps(tokens))
    assert plan_of(packed).export(source, tmp_path / "out").ok
    read, notes = facts(tmp_path / "out")
    assert read is None and any("vocabulary ends at 2559" in n for n in notes)


def test_floats_read_nothing(tmp_path: Path) -> None:
    """Nothing of the dense organism is packed, and nothing of a float export stays so."""
    dense = vauban.organism_path("dense")
    assert plan_of(vauban.load(dense)[0]).export(dense, tmp_path / "dense").ok
    narrow = vauban.organism_path("4bit")
    assert plan_of(vauban.load(narrow)[0]).export(narrow, tmp_path / "float", "float").ok
    for name in ("dense", "float"):
        assert facts(tmp_path / name) == (None, facts(tmp_path / name)[1])
        assert not any("alike" in n for n in facts(tmp_path / name)[1])


def test_runs_read_as_many_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert OutputSection().calibrate == reading.PROMPTS
