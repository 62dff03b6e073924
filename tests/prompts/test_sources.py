"""Sources: what a reference may look like, and where its prompts come from."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vauban.errors import InputError, VaubanWarning
from vauban.prompts import (
    DatasetRef,
    default_eval_path,
    default_preservation_path,
    default_prompt_paths,
    default_surface_path,
    load_prompts,
    resolve_prompts,
)

name = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,12}", fullmatch=True)


def test_references_are_read() -> None:
    assert DatasetRef.parse("hf:org/name") == DatasetRef("org/name", "train", "prompt", None, None)
    full = "hf:org/name?split=train+test[:20%25]&column=my%20text&config=en&limit=7&revision=v1.0"
    assert DatasetRef.parse(full) == DatasetRef(
        "org/name", "train+test[:20%]", "my text", "en", 7, "v1.0"
    )
    table = {"hf": "org/name", "split": "test", "limit": 7}
    assert DatasetRef.from_table(table) == DatasetRef("org/name", split="test", limit=7)
    assert str(DatasetRef("org/name")) == "hf:org/name"


@given(
    st.builds(
        DatasetRef,
        st.builds("{}/{}".format, name, name),
        split=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
        column=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
        config=st.none() | name,
        limit=st.none() | st.integers(1, 10**6),
        revision=st.none() | name,
    )
)
def test_the_text_of_a_reference_reads_back(reference: DatasetRef) -> None:
    assert DatasetRef.parse(str(reference)) == reference


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hf:", "expected 'org/name'"),
        ("hf:a/b/c", "expected 'org/name'"),
        ("hf:../data", "expected 'org/name'"),
        ("hf:org/name?colum=text", "unknown key 'colum'; did you mean 'column'"),
        ("hf:org/name?zzz=1", "known: split, column, config, limit, revision"),
        ("hf:org/name?split", "'split' is not of the form key=value"),
        ("hf:org/name?split=", "split has to be a name"),
        ("hf:org/name?config=", "config has to be a name"),
        ("hf:org/name?limit=many", "limit has to be a positive whole number, given 'many'"),
        ("hf:org/name?limit=0", "limit has to be a positive whole number, given 0"),
    ],
)
def test_a_wrong_reference_is_refused_before_any_download(text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_prompts(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"split": "test"}, "needs the key 'hf'"),
        ({"hf": 3}, "needs the key 'hf'"),
        ({"hf": "org/name", "limits": 3}, "did you mean 'limit'"),
        ({"hf": "org/name", "limit": True}, "limit has to be a positive whole number"),
        ({"hf": "org/name", "column": 3}, "column has to be a name"),
    ],
)
def test_a_wrong_table_is_refused(table: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_prompts(table)
    assert said in str(caught.value)


def test_the_bundled_sets_go_by_kind() -> None:
    harmful, harmless = default_prompt_paths()
    paths = {
        "harmful": harmful,
        "harmless": harmless,
        "eval": default_eval_path(),
        "surface": default_surface_path(),
        "preservation": default_preservation_path(),
    }
    for kind, path in paths.items():
        assert resolve_prompts("default", kind=kind) == load_prompts(path)
    assert len({tuple(resolve_prompts("default", kind=kind)) for kind in paths}) == 5
    for kind in (None, "harmfull"):
        with pytest.raises(InputError, match="needs a kind, one of harmful, harmless, eval"):
            resolve_prompts("default", kind=kind)


def test_paths_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("Hello\n")
    assert resolve_prompts(tmp_path / "a.txt") == ["Hello"]
    assert resolve_prompts(str(tmp_path / "a.txt"), base_dir="elsewhere") == ["Hello"]
    assert resolve_prompts("a.txt", base_dir=tmp_path) == ["Hello"]
    monkeypatch.chdir(tmp_path)
    assert resolve_prompts("a.txt") == ["Hello"]
    assert resolve_prompts(("one", "two")) == ["one", "two"]
    with pytest.raises(InputError, match=r"a Hub data set is written hf:org/name"):
        resolve_prompts("org/name")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ([], "the list of prompts is empty"),
        (["a", 3], "prompt 1: a prompt has to be a text, given int 3"),
        (["a", " "], "prompt 1: the prompt is empty"),
        (None, "cannot be read from NoneType"),
        (b"abc", "cannot be read from bytes"),
    ],
)
def test_other_things_are_refused(source: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_prompts(source)
    assert said in str(caught.value)


def test_without_the_library_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"hf:org/name: .*pip install datasets"):
        resolve_prompts("hf:org/name")


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A local folder org/name, which `datasets` prefers to the Hub's org/name."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    rows = {
        "train": [{"prompt": f"train {i}", "text": f"t{i}", "n": i} for i in range(5)],
        "test": [{"prompt": p, "text": "t", "n": 1} for p in ("a", None, "b", " ", "c")],
    }
    for split, items in rows.items():
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, items)))
    return "hf:org/name"


def test_a_data_set_is_read_by_split_column_and_limit(data_set: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", VaubanWarning)
        assert resolve_prompts(data_set) == [f"train {i}" for i in range(5)]
        assert resolve_prompts(DatasetRef("org/name", column="text", limit=2)) == ["t0", "t1"]
        assert resolve_prompts({"hf": "org/name", "split": "train[3:]"}) == ["train 3", "train 4"]
        assert resolve_prompts(data_set + "?split=test&limit=1") == ["a"]


def test_rows_without_a_text_are_left_out_and_counted(data_set: str) -> None:
    with pytest.warns(VaubanWarning, match="left out 2 empty rows"):
        assert resolve_prompts(data_set + "?split=test") == ["a", "b", "c"]
    with pytest.warns(VaubanWarning, match="left out 1 empty rows"):
        assert resolve_prompts(data_set + "?split=test&limit=2") == ["a", "b"]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("?column=question", "no column 'question'; the columns there are: prompt, text, n."),
        ("?column=n", "row 0, column 'n': a prompt has to be a text, given int 0"),
        ("?split=test[1:2]", "column 'prompt' holds no texts"),
        ("?split=validation", "could not be loaded (ValueError: "),
        ("?config=french", "could not be loaded (ValueError: "),
    ],
)
def test_what_the_data_set_lacks_is_said(data_set: str, query: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_prompts(data_set + query)
    assert data_set + query in str(caught.value)
    assert said in str(caught.value)
