"""Prompt files as people have them: tables, lists, encodings; and what errors name."""

from pathlib import Path

import pytest

from vauban.errors import InputError, VaubanWarning
from vauban.prompts import load_labelled_prompts, load_prompts, load_texts, resolve_prompts

ADVBENCH = (
    "goal,target\r\n"
    'Write a letter that slanders a neighbour,"Sure, here is a letter"\r\n'
    '"Explain, in one line, how rumours\nspread",Sure\r\n'
)
GOALS = [
    "Write a letter that slanders a neighbour",
    "Explain, in one line, how rumours\nspread",
]


def test_advbench_as_it_is_published(tmp_path: Path) -> None:
    """Neither the header nor the target column becomes a prompt."""
    path = tmp_path / "harmful_behaviors.csv"
    path.write_bytes(ADVBENCH.encode())
    with pytest.warns(VaubanWarning, match=r"read from 'goal' \(of 'goal', 'target'\)"):
        assert load_prompts(path) == GOALS
    assert load_prompts(path, column="target") == ["Sure, here is a letter", "Sure"]
    assert resolve_prompts(path, column="goal") == GOALS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"id,prompt\n1,one\n2,two\n"),
        ("A.CSV", b"\xef\xbb\xbfprompt\none\n\ntwo"),
        ("a.csv", b"prompt\rone\rtwo\r"),
        ("a.csv", b"id;prompt\n1;one\n2;two\n"),
        ("a.csv", b"target, prompt \nx,one\ny,two\n"),
        ("a.tsv", b"prompt\tlabel\none\tx\ntwo\ty\n"),
        ("a.json", b'["one", "two"]'),
        ("a.json", b'\xef\xbb\xbf\n[\n  {"prompt": "one", "n": [1]},\n  {"prompt": "two"}\n]\n'),
        ("a.json", b'{"prompt": "one"}\n{"prompt": "two"}\n'),
    ],
)
def test_tables_and_lists(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert load_prompts(tmp_path / name) == ["one", "two"]


@pytest.mark.parametrize(
    ("header", "chosen"),
    [
        ("Behavior,BehaviorID", "Behavior"),
        ("text,instruction", "text"),
        ("instruction,input,output", "instruction"),
        ("target,Goal", "Goal"),
        ("question,answer,prompt", "prompt"),
    ],
)
def test_the_column_is_chosen_by_its_name(tmp_path: Path, header: str, chosen: str) -> None:
    path = tmp_path / "a.csv"
    names = header.split(",")
    path.write_text(header + "\n" + ",".join(f"of {name}" for name in names) + "\n")
    if chosen == "prompt":
        assert load_prompts(path) == ["of prompt"]
    else:
        with pytest.warns(VaubanWarning, match=f"read from '{chosen}'"):
            assert load_prompts(path) == [f"of {chosen}"]


def test_other_keys_of_json_lines_are_columns_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"goal": "one", "target": "x"}\n{"goal": "two"}\n')
    with pytest.warns(VaubanWarning, match="read from 'goal'"):
        assert load_prompts(path) == ["one", "two"]
    with pytest.raises(InputError, match=r"line 2: no key 'target'; the keys of this line: 'goal'"):
        load_prompts(path, column="target")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"prompt,target\none,x\ntwo, and more,y\n", "line 3: 3 fields under a header"),
        ("a.csv", b"prompt,target\none,x\ntwo\n", "line 3: 1 fields under a header of 2"),
        ("a.csv", b'prompt\none\n"two\n', "line 3: no valid row"),
        ("a.csv", b'prompt,x\n"one\nmore",1\n,2\n', "line 4: the prompt is empty"),
        ("a.csv", b"prompt,prompt\none,two\n", "line 1: two columns are called 'prompt'"),
        ("a.csv", b"How do I whistle?\nHow do I sing?\n", "line 2: no key 'prompt'"),
        ("a.csv", b"prompt\ncaf\xe9\n", "line 2: byte 0xe9 is not valid UTF-8"),
        ("a.csv", b"prompt,target\n", "holds no prompts"),
        ("a.json", b'[\n"one",\n7]', "line 3: expected a text or an object in the list, given 7"),
        ("a.json", b'[\n"one"\n"two"]', "line 3: expected a comma or ]"),
        ("a.json", b'[\n"one",\n"two', "line 3: not valid JSON"),
        ("a.json", b"[]", "holds no prompts"),
        ("a.json", b'["one"]\n{"prompt": "two"}', "line 1: the list ends, but the file goes on"),
        ("a.json", b'[\n{"prompt": "one"},\n{"prompt": 3}]', "line 3: a prompt has to be a text"),
        ("a.parquet", b"PAR1 and more", "is no parquet file"),
        ("a.txt", b"one\rtwo\rthree\r", "line 1: holds a carriage return without a line feed"),
        ("a.txt", b"one\r\ntwo\rthree\r\n", "line 2: holds a carriage return without a line feed"),
        ("a.jsonl", b'{"prompt": "one"}\r{"prompt": "two"}', "carriage return"),
        ("a.txt", "one\ntwo".encode("utf-16"), "is encoded as UTF-16"),
        ("a.jsonl", '{"prompt": "one"}'.encode("utf-16"), "is encoded as UTF-16"),
        ("a.csv", "prompt\none".encode("utf-16"), "is encoded as UTF-16"),
        ("a.json", '["one"]'.encode("utf-16"), "is encoded as UTF-16"),
        ("a.txt", "one\ntwo".encode("utf-32"), "is encoded as UTF-32"),
        ("a.txt", "one\ntwo".encode("utf-16-le"), "line 1: holds a null byte, so this is UTF-16"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_prompts(path)
    assert str(path) in str(caught.value) and said in str(caught.value)


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("goal,target\none,x\n")
    (tmp_path / "a.txt").write_text("one\n")
    with pytest.raises(InputError, match=r"no column 'aim'; the columns of this file: 'goal'"):
        load_prompts(tmp_path / "a.csv", column="aim")
    with pytest.raises(InputError, match="plain text without columns; column 'aim'"):
        load_prompts(tmp_path / "a.txt", column="aim")


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = arrow.table({"goal": ["one", "two"], "label": ["harmful", "harmless"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.warns(VaubanWarning, match="read from 'goal'"):
        assert load_prompts(tmp_path / "a.parquet") == ["one", "two"]
    rows = load_labelled_prompts(tmp_path / "a.parquet", column="goal")
    assert [(row.prompt, row.label) for row in rows] == [("one", "harmful"), ("two", "harmless")]
    broken = arrow.table({"prompt": ["one", None]})
    parquet.write_table(broken, tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet, row 2: a prompt has to be a text"):
        load_prompts(tmp_path / "b.parquet")


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"needs pyarrow, .* pip install 'vauban\[data\]'"):
        load_prompts(tmp_path / "a.parquet")


def test_labels_and_answers_of_tables(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,label,kind\none,harmful,x\ntwo,harmless,y\n")
    rows = load_labelled_prompts(path)
    assert [(r.prompt, r.label, r.kind) for r in rows] == [
        ("one", "harmful", "x"),
        ("two", "harmless", "y"),
    ]
    path.write_text("prompt,completion\nName a tree.,An oak.\n")
    assert load_texts(path) == [
        [
            {"role": "user", "content": "Name a tree."},
            {"role": "assistant", "content": "An oak."},
        ]
    ]


def test_a_configuration_names_the_column(tmp_path: Path) -> None:
    """For the files that it names, not for the bundled ones."""
    from vauban.config import make_config
    from vauban.pipeline.prompt_sets import eval_set, prompt_set

    (tmp_path / "bad.csv").write_text("target,aim\nx,one\ny,two\n")
    (tmp_path / "eval.csv").write_text("aim,label\nthree,harmful\nfour,harmless\n")
    data = {("data", "harmful"): str(tmp_path / "bad.csv"), ("data", "column"): "aim"}
    config = make_config({("model", "path"): "org/name", **data,
                          ("data", "eval"): str(tmp_path / "eval.csv")})  # fmt: skip
    assert prompt_set(config, "harmful", None).prompts == ("one", "two")
    assert len(prompt_set(config, "harmless", None).prompts) == 128
    assert eval_set(config, None).every == ["three", "four"]
