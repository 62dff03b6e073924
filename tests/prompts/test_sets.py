"""Prompt files: what is read, and how errors name the file and the line."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vauban.errors import InputError
from vauban.prompts import (
    LabelledPrompt,
    load_labelled_prompts,
    load_prompts,
    model_prompt_sets,
)

in_one_folder = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None
)
sentence = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "A.JSONL"])
def test_jsonl_keeps_order_and_skips_blank_lines(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text('{"prompt": "first", "x": 1}\n\n   \n{"prompt": " second "}', encoding="utf-8")
    assert load_prompts(path) == ["first", " second "]
    assert load_prompts(str(path)) == ["first", " second "]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "prompts"])
def test_plain_text_is_one_prompt_per_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b'\n  How are you?  \r\n\r\n{"prompt": "not JSON here"}\r\n')
    assert load_prompts(path) == ["How are you?", '{"prompt": "not JSON here"}']


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_only_newlines_end_a_line(tmp_path: Path, name: str) -> None:
    prompt = "one\u2028still one\x0cand one\x85end"
    line = json.dumps({"prompt": prompt}, ensure_ascii=False) if name == "a.jsonl" else prompt
    (tmp_path / name).write_text(line + "\n", encoding="utf-8", newline="")
    assert load_prompts(tmp_path / name) == [prompt]


def test_a_byte_order_mark_is_no_part_of_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hello", encoding="utf-8-sig")
    (tmp_path / "a.jsonl").write_text('{"prompt": "Hello"}', encoding="utf-8-sig")
    assert load_prompts(tmp_path / "a.txt") == load_prompts(tmp_path / "a.jsonl") == ["Hello"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "x"', "not valid JSON"),
        (b"Hello", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'["x"]', "expected a JSON object"),
        (b'{"text": "x", "id": 3}', "no key 'prompt'; the keys of this line: 'text', 'id'"),
        (b"{}", "the keys of this line: none"),
        (b'{"prompt": 7}', "given int 7"),
        (b'{"prompt": ["' + b"x" * 9999 + b'"]}', "given list ['xxx"),
        (b'{"prompt": null}', "given NoneType None"),
        (b'{"prompt": "  "}', "the prompt is empty"),
        (b'{"prompt": "half \\ud83d"}', "half of a surrogate pair"),
        (b'{"prompt": "caf\xe9"}', "byte 0xe9 is not valid UTF-8"),
    ],
)
def test_a_bad_line_is_named_with_its_file(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n\n' + line + b'\n{"prompt": "fine"}\n')
    with pytest.raises(InputError) as caught:
        load_prompts(path)
    assert f"{path}, line 3: " in str(caught.value)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_a_text_file_in_another_encoding_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("fine\ncafé\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.txt, line 2: byte 0xe9 .* save the file as UTF-8"):
        load_prompts(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_files_without_prompts_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\n \n")
    with pytest.raises(InputError, match="holds no prompts"):
        load_prompts(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        load_prompts(tmp_path / "other" / name)
    with pytest.raises(InputError, match="is a folder"):
        load_prompts(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        load_prompts(f"{tmp_path}/\0{name}")


@in_one_folder
@given(st.lists(sentence, min_size=1))
def test_jsonl_round_trip(tmp_path: Path, prompts: list[str]) -> None:
    path = tmp_path / "a.jsonl"
    for ascii_only in (True, False):
        lines = [json.dumps({"prompt": text}, ensure_ascii=ascii_only) for text in prompts]
        path.write_bytes("\n".join(lines).encode())
        assert load_prompts(path) == prompts


@in_one_folder
@given(st.binary(), st.sampled_from(["a.txt", "a.jsonl"]))
def test_any_bytes_give_prompts_or_an_error_that_names_the_file(
    tmp_path: Path, raw: bytes, name: str
) -> None:
    (tmp_path / name).write_bytes(raw)
    try:
        prompts = load_prompts(tmp_path / name)
    except InputError as error:
        assert str(tmp_path / name) in str(error)
    else:
        assert prompts and all(text.strip() for text in prompts)


def test_labelled_rows_keep_whatever_else_the_line_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "P", "kind": "task", "label": "harmless", "n": [1]}\n')
    (row,) = load_labelled_prompts(str(path))
    assert (row.prompt, row.label, row.kind, row.n) == ("P", "harmless", "task", [1])
    assert (row["prompt"], row["label"], row["kind"]) == ("P", "harmless", "task")
    assert dict(row.extra) == {"kind": "task", "n": [1]}
    assert dict(row) == row.to_dict() == json.loads(path.read_text())
    assert row.get("kind") == "task" and row.get("style", "direct") == "direct"
    with pytest.raises(AttributeError, match="no 'style'; it holds prompt, label, kind, n"):
        _ = row.style
    with pytest.raises(KeyError):
        row["style"]


def test_labelled_rows_are_frozen_values() -> None:
    extra = {"kind": "task"}
    row = LabelledPrompt("P", "harmless", extra)
    extra["kind"] = "changed"
    assert row.kind == "task"
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.label = "harmful"  # type: ignore[misc]
    with pytest.raises(TypeError):
        row.extra["kind"] = "changed"  # type: ignore[index]
    assert row == LabelledPrompt("P", "harmless", {"kind": "task"})
    assert row != LabelledPrompt("P", "harmless", {"kind": "how-to"})
    assert len({row, LabelledPrompt("P", "harmless", {"kind": "task"})}) == 1
    for twin in (copy.deepcopy(row), pickle.loads(pickle.dumps(row))):
        assert twin == row and twin.kind == "task"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "x"}', "no key 'label'"),
        ('{"prompt": "x", "label": 1}', "'label' has to be a text"),
        ('{"prompt": "x", "label": " "}', "'label' has to be a text"),
        ('{"label": "harmful"}', "no key 'prompt'"),
    ],
)
def test_bad_labels_are_named_with_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "x", "label": "harmful"}\n' + line)
    with pytest.raises(InputError) as caught:
        load_labelled_prompts(path)
    assert f"{path}, line 2: " in str(caught.value) and said in str(caught.value)


def test_labels_need_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hello\n")
    with pytest.raises(InputError, match="labelled prompts need a JSONL file"):
        load_labelled_prompts(tmp_path / "a.txt")


def write_model(folder: Path, table: object) -> Path:
    (folder / "prompts").mkdir(parents=True)
    (folder / "prompts" / "bad.jsonl").write_text('{"prompt": "x"}')
    (folder / "vauban.json").write_text(table if isinstance(table, str) else json.dumps(table))
    return folder


def test_a_model_folder_names_its_own_prompt_sets(tmp_path: Path) -> None:
    table = {"harmful": "prompts/bad.jsonl", "eval": "./prompts/bad.jsonl", "note": 1}
    model = write_model(tmp_path / "model", table)
    sets = model_prompt_sets(model)
    assert sets is not None
    assert sets.harmful == sets.eval == model / "prompts" / "bad.jsonl"
    assert sets.harmless is None
    assert load_prompts(sets.harmful) == ["x"]


def test_models_without_the_file_name_none(tmp_path: Path) -> None:
    assert model_prompt_sets(tmp_path) is None
    assert model_prompt_sets("org/name-on-the-hub") is None


@pytest.mark.parametrize(
    "value", ["../secret.jsonl", "prompts/../../secret.jsonl", "C:\\secret", "a\\..\\..\\b", "/x"]
)
def test_prompt_sets_must_stay_inside_the_model_folder(tmp_path: Path, value: str) -> None:
    (tmp_path / "secret.jsonl").write_text('{"prompt": "x"}')
    model = write_model(tmp_path / "model", {"harmless": value})
    with pytest.raises(InputError, match=r"vauban\.json: harmless: .* leads out of the model"):
        model_prompt_sets(model)


def test_an_absolute_path_is_refused_even_inside_the_folder(tmp_path: Path) -> None:
    inside = str(tmp_path / "model" / "prompts" / "bad.jsonl")
    model = write_model(tmp_path / "model", {"harmless": inside})
    with pytest.raises(InputError, match="leads out of the model folder"):
        model_prompt_sets(model)


def test_links_may_not_leave_the_folder_but_the_hub_cache_may_link_to_its_blobs(
    tmp_path: Path,
) -> None:
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc").write_text('{"prompt": "from the cache"}')
    snapshot = tmp_path / "models--org--name" / "snapshots" / "123"
    elsewhere = tmp_path / "plain"
    for model in (snapshot, elsewhere):
        write_model(model, {"eval": "prompts/linked.jsonl"})
        (model / "prompts" / "linked.jsonl").symlink_to(blobs / "abc")
    sets = model_prompt_sets(snapshot)
    assert sets is not None and load_prompts(sets.eval) == ["from the cache"]
    with pytest.raises(InputError, match="leads out of the model folder"):
        model_prompt_sets(elsewhere)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('{"harmful": ', "not valid JSON"),
        ('["a"]', "expected a JSON object"),
        ({"harmful": ["a.jsonl"]}, "expected a path relative to the folder"),
        ({"harmful": "a\0.jsonl"}, "expected a path relative to the folder"),
        ({"harmful": "missing.jsonl"}, "is not a file"),
        ({"harmful": "prompts"}, "is not a file"),
    ],
)
def test_a_broken_vauban_json_is_an_error_that_names_it(
    tmp_path: Path, table: object, said: str
) -> None:
    model = write_model(tmp_path / "model", table)
    with pytest.raises(InputError, match=said) as caught:
        model_prompt_sets(model)
    assert str(model / "vauban.json") in str(caught.value)
