"""Text sets: the bundled ones, files, lists and Hub data sets, and what is said of a wrong one."""

import json
from pathlib import Path
from typing import Any

import pytest

from vauban.errors import InputError
from vauban.prompts import (
    ALPACA,
    PILE,
    DatasetRef,
    default_texts_path,
    load_prompts,
    load_texts,
)
from vauban.prompts.records import file_rows
from vauban.prompts.sources import split_reference


def test_the_bundled_texts_are_neutral_rows_in_two_languages() -> None:
    plain, chats = load_texts("plain"), load_texts("chat")
    assert len(plain) == len(chats) == 60
    assert len(set(plain)) == 60 and len({c[0]["content"] for c in chats}) == 60
    for kind in ("plain", "chat"):
        languages = [row["language"] for _, row in file_rows(default_texts_path(kind))]
        assert languages.count("en") == languages.count("fr") == 30
    for text in plain:
        assert isinstance(text, str) and 2 <= text.count(". ") + 1 <= 4 and len(text) < 260
    for turns in chats:
        assert [turn["role"] for turn in turns] == ["user", "assistant"]
    facts = load_texts("facts")
    assert len(facts) == len(set(facts)) > 700
    assert all(isinstance(text, str) and text[-1] == "." and len(text) < 90 for text in facts)
    with pytest.raises(InputError, match="'plain', 'chat' or 'facts'"):
        default_texts_path("pile")


def test_files_hold_texts_or_answered_prompts(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows: list[dict[str, Any]] = [
        {"text": "A text."},
        {"prompt": "p", "completion": "c"},
        {"prompt": "p", "response": "r", "other": 1},
        {"prompt": "p", "answer": "a"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    entries = load_texts(path)
    assert entries[0] == "A text."
    assert [e[1]["content"] for e in entries[1:]] == ["c", "r", "a"]
    assert load_texts("t.jsonl", base_dir=tmp_path, limit=2) == entries[:2]
    assert load_texts(entries) == entries
    lines = tmp_path / "t.txt"
    lines.write_text("one\n\ntwo\n")
    assert load_texts(lines) == load_prompts(lines) == ["one", "two"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "p"}, "line 1: expected the key 'text', or 'prompt' and one of completion"),
        ({"prompt": "p", "answer": "a", "response": "b"}, "line 1: expected the key 'text'"),
        ({"text": ""}, "line 1: 'text' has to be a text that is not empty"),
        ({"prompt": "p", "answer": 3}, "line 1: 'answer' has to be a text"),
    ],
)
def test_a_wrong_line_is_named(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(InputError) as caught:
        load_texts(path)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (3, "texts cannot be read from int"),
        ([], "not empty"),
        ("hf:a/b?prompt=p", "names the columns prompt=... and completion=..."),
        ("hf:a/b?prompt=p&completion=c&column=x", "names the columns"),
        ("hf:a/b?prompt=p&completion=c&shuffle=x", "shuffle is 'x'"),
        ("hf:a/b?prompt=p&completion=c&splt=x", "did you mean 'split'"),
        ({"column": "text"}, "needs the key 'hf'"),
    ],
)
def test_a_wrong_source_is_refused(source: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_texts(source)
    assert said in str(caught.value)
    with pytest.raises(InputError, match="limit is 0"):
        load_texts("plain", limit=0)


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Local folders, which `datasets` prefers to the Hub's data sets of the same name."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "org" / "alpaca"
    folder.mkdir(parents=True)
    rows = [
        {
            "instruction": f"i{n}",
            "input": "given" if n % 3 == 0 else "",
            "output": "" if n == 4 else f"o{n}",
            "text": "" if n == 1 else f"t{n}",
            "n": n,
        }
        for n in range(12)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "hf:org/alpaca"


def prompts_of(entries: list[Any]) -> list[str]:
    return [entry[0]["content"] for entry in entries]


def test_texts_of_a_data_set(data_set: str) -> None:
    every = [f"t{n}" for n in range(12) if n != 1]
    assert load_texts(data_set + "?column=text") == every
    # With a limit the rows are streamed.
    assert load_texts(data_set + "?column=text&limit=3") == ["t0", "t2", "t3"]
    assert load_texts(DatasetRef("org/alpaca", column="text"), limit=2) == ["t0", "t2"]
    assert load_texts({"hf": "org/alpaca", "column": "text", "split": "train[2:4]"}, limit=9) == [
        "t2",
        "t3",
    ]
    for query, said in (
        ("?column=body&limit=2", "no column 'body'; the columns there are: instruction, input"),
        ("?column=n", "'n' has to be a text"),
        ("?column=text&split=nowhere", "could not be loaded"),
        ("?column=text&split=nowhere&limit=1", "could not be loaded"),
    ):
        with pytest.raises(InputError) as caught:
            load_texts(data_set + query)
        assert said in str(caught.value)


def test_chats_of_a_data_set_keep_rows_with_an_empty_input(data_set: str) -> None:
    query = "?prompt=instruction&completion=output"
    assert prompts_of(load_texts(data_set + query)) == [f"i{n}" for n in range(12) if n != 4]
    kept = [n for n in range(12) if n % 3 and n != 4]
    entries = load_texts(data_set + query + "&empty=input")
    assert prompts_of(entries) == [f"i{n}" for n in kept]
    assert entries[0][1] == {"role": "assistant", "content": "o1"}
    shuffled = prompts_of(load_texts(data_set + query + "&empty=input&shuffle=42"))
    assert sorted(shuffled) == sorted(f"i{n}" for n in kept)
    assert shuffled != [f"i{n}" for n in kept]
    table = {
        "hf": "org/alpaca", "prompt": "instruction", "completion": "output", "empty": "input",
        "shuffle": 42, "limit": 3,
    }  # fmt: skip
    assert prompts_of(load_texts(table)) == shuffled[:3]


def test_the_named_data_sets_are_those_of_the_paper() -> None:
    repo_id, options = split_reference(PILE)
    assert (repo_id, options["column"]) == ("monology/pile-uncopyrighted", "text")
    repo_id, options = split_reference(ALPACA)
    assert repo_id == "tatsu-lab/alpaca"
    assert (options["prompt"], options["completion"], options["empty"]) == (
        "instruction", "output", "input",
    )  # fmt: skip
    assert options["shuffle"] == "42"
