"""Which prompt sets a run takes, and how the held-out ones are thinned."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from vauban.config import make_config
from vauban.errors import InputError
from vauban.pipeline.prompt_sets import eval_set, overlap_warning, prompt_set


def _config(**sections):
    values = {(section, key): v for section, keys in sections.items() for key, v in keys.items()}
    return make_config({("model", "path"): "org/name", **values})


@pytest.fixture
def model_folder(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "own.jsonl").write_text('{"prompt": "the model\'s own"}\n')
    (folder / "vauban.json").write_text(json.dumps({"harmful": "own.jsonl"}))
    return folder


def test_the_configuration_wins_over_the_model_folder_over_the_bundled(model_folder, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine\n")
    given = _config(data={"harmful": str(mine)})
    assert prompt_set(given, "harmful", model_folder).prompts == ("mine",)
    assert prompt_set(given, "harmful", model_folder).origin == "configuration"
    own = prompt_set(_config(), "harmful", model_folder)
    assert own.prompts == ("the model's own",) and own.origin == "model folder"
    # The folder names no harmless set, so that one is the bundled one.
    bundled = prompt_set(_config(), "harmless", model_folder)
    assert bundled.origin == "bundled" and len(bundled.prompts) == 128
    asked = prompt_set(_config(data={"harmful": "default"}), "harmful", model_folder)
    assert asked.origin == "bundled"


def test_a_set_is_known_by_the_hash_of_its_file(tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("one\ntwo\n")
    found = prompt_set(_config(data={"harmful": str(mine)}), "harmful", None)
    assert found.sha256 == hashlib.sha256(mine.read_bytes()).hexdigest()
    assert found.to_dict()["count"] == 2


def test_a_list_in_the_configuration_is_a_set():
    found = prompt_set(_config(data={"harmful": ["one", "two"]}), "harmful", None)
    assert found.prompts == ("one", "two") and found.source == "list"


def test_thinning_keeps_every_kind_and_sets_contrast_apart():
    found = eval_set(_config(eval={"num_prompts": 16}), None)
    assert len(found.harmful) == len(found.harmless) == len(found.contrast) == 16
    assert {row.label for row in found.harmful} == {"harmful"}
    assert Counter(row.kind for row in found.harmless) == {"how-to": 8, "task": 8}
    assert {row.kind for row in found.contrast} == {"contrast"}
    assert {row.kind for row in found.how_to} == {"how-to"}


def test_a_file_that_says_no_kind_has_no_contrast(tmp_path):
    path = tmp_path / "eval.jsonl"
    rows = [{"prompt": f"{label} {i}", "label": label} for label in ("harmful", "harmless")
            for i in range(3)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = eval_set(_config(data={"eval": str(path)}), None)
    assert found.how_to == found.harmless and len(found.harmless) == 3 and not found.contrast


def test_a_missing_class_is_named_with_the_labels_found(tmp_path):
    path = tmp_path / "eval.jsonl"
    path.write_text('{"prompt": "a", "label": "harmful"}\n{"prompt": "b", "label": "safe"}\n')
    with pytest.raises(InputError, match=r"'harmless'.*'safe'"):
        eval_set(_config(data={"eval": str(path)}), None)


def test_held_out_prompts_that_were_measured_on_are_counted():
    held_out = eval_set(_config(), None)
    clean = prompt_set(_config(), "harmful", None)
    assert overlap_warning((clean,), held_out) is None
    leaked = prompt_set(
        _config(data={"harmful": [held_out.texts("harmful")[0], "x"]}), "harmful", None
    )
    assert "1 of the" in (overlap_warning((leaked,), held_out) or "")
    for prompt in (held_out.texts("contrast")[0], held_out.texts("how_to")[-1]):
        leaked = prompt_set(_config(data={"harmless": [prompt, "x"]}), "harmless", None)
        assert "1 of the" in (overlap_warning((leaked,), held_out) or "")
