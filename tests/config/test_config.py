"""The schema: what a file may say, what its errors say, and the three texts read off it."""

import tomllib
from pathlib import Path

import pytest

from vauban.cli.parsers import main_parser
from vauban.cli.setting_flags import settings
from vauban.config import load_config, make_config, reference, scaffold, write_scaffold
from vauban.config.keys import keys
from vauban.config.load import find_line
from vauban.config.run_schema import RunConfig
from vauban.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
MODEL = '[model]\npath = "org/name"\n'


def _write(folder: Path, text: str) -> Path:
    path = folder / "study.toml"
    path.write_text(text, encoding="utf-8")
    return path


def _error(folder: Path, text: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(_write(folder, text))
    return str(caught.value)


def test_the_scaffold_is_valid_and_says_every_key(tmp_path):
    path = write_scaffold(tmp_path / "study.toml", model="org/name")
    assert load_config(path) == RunConfig.model_validate(
        {"model": {"path": "org/name"}, **_dirs(tmp_path)}
    )
    text = path.read_text(encoding="utf-8")
    for key in keys(RunConfig):
        assert find_line(text.replace("# " + key.name, key.name), key.section, key.name), key.path


def _dirs(folder: Path) -> dict:
    return {"output": {"dir": str(folder / "output")}}


def test_every_line_of_the_scaffold_can_be_uncommented(tmp_path):
    names = {key.name for key in keys(RunConfig)}
    lines = [
        line[2:] if line.startswith("# ") and line[2:].split(" = ")[0] in names else line
        for line in scaffold("org/name").splitlines()
    ]
    config = load_config(_write(tmp_path, "\n".join(lines)))
    unset = [key.path for key in keys(RunConfig) if _value(config, key.path) is None]
    assert not unset


def _value(config: RunConfig, path: tuple[str, ...]):
    value = config
    for part in path:
        value = getattr(value, part)
    return value


def test_the_scaffold_replaces_no_file_unless_forced(tmp_path):
    path = _write(tmp_path, "mine")
    with pytest.raises(InputError, match="--force"):
        write_scaffold(path)
    assert path.read_text() == "mine"
    write_scaffold(path, force=True)
    assert tomllib.loads(path.read_text())


def test_the_reference_page_is_up_to_date():
    page = ROOT / "docs" / "reference" / "configuration.md"
    assert page.read_text(encoding="utf-8") == reference(), (
        "run: python -m vauban.config > docs/reference/configuration.md"
    )


def test_an_unknown_key_names_file_line_and_the_likely_key(tmp_path):
    message = _error(tmp_path, MODEL + "\n[cut]\n# a comment\nalhpa = 0.5\n")
    assert "study.toml, line 6" in message
    assert "'alhpa'" in message and "'alpha'" in message


def test_a_key_of_another_section_is_sent_there(tmp_path):
    assert "[cut]" in _error(tmp_path, MODEL + "[measure]\nalpha = 1.0\n")


def test_an_unknown_section_is_suggested(tmp_path):
    assert "'measure'" in _error(tmp_path, MODEL + "[mesure]\nlayer = 2\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[cut]\nalpha = "high"\n', ["line 4", "[cut] alpha", "'high'", "finite number"]),
        ("[cut]\nalpha = true\n", ["[cut] alpha", "True"]),
        ("[cut]\nalpha = nan\n", ["[cut] alpha", "nan", "finite"]),
        ("[cut]\nlayers = [0, -1]\n", ["[cut] layers", "-1", "element 2"]),
        ('[measure]\nlayer = "best"\n', ["[measure] layer", "'best'", "auto"]),
        ("[measure]\nclip_quantile = 0.5\n", ["clip_quantile", "0.5"]),
        ("[eval]\nmax_tokens = 0\n", ["max_tokens", "0", "above 0"]),
        ("[data]\nharmful = 3\n", ["[data] harmful", "JSONL"]),
        ('[data]\nharmful = { hf = "org/set", colum = "x" }\n', ["harmful"]),
    ],
)
def test_a_wrong_value_names_the_key_what_was_given_and_what_is_expected(tmp_path, text, expected):
    message = _error(tmp_path, MODEL + text)
    for part in expected:
        assert part in message, message
    assert message.count("\n") == 0, message


def test_a_missing_model_says_what_to_add(tmp_path):
    assert "[model]" in _error(tmp_path, "seed = 1\n")


def test_broken_toml_and_missing_files_are_named(tmp_path):
    assert "study.toml" in _error(tmp_path, "[model\n")
    with pytest.raises(InputError, match="vauban init"):
        load_config(tmp_path / "absent.toml")


def test_paths_are_relative_to_the_file(tmp_path):
    (tmp_path / "model").mkdir()
    text = (
        '[model]\npath = "model"\n[data]\nharmful = "a.jsonl"\nharmless = "default"\n'
        'eval = "sub/e.jsonl"\n[output]\ndir = "out"\n'
    )
    config = load_config(_write(tmp_path, text))
    assert config.model.path == str(tmp_path / "model")
    assert config.data.harmful == str(tmp_path / "a.jsonl")
    assert config.data.harmless == "default"
    assert config.data.eval == str(tmp_path / "sub" / "e.jsonl")
    assert config.output.dir == str(tmp_path / "out")


def test_a_hub_id_stays_one_unless_such_a_folder_stands_beside_the_file(tmp_path):
    path = _write(tmp_path, MODEL)
    assert load_config(path).model.path == "org/name"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert load_config(path).model.path == str(tmp_path / "org" / "name")


def test_flags_win_over_the_file_and_name_themselves_in_errors(tmp_path):
    path = _write(tmp_path, MODEL + "[cut]\nalpha = 0.5\n")
    assert load_config(path, {("cut", "alpha"): 0.25}).cut.alpha == 0.25
    with pytest.raises(InputError, match="--alpha is 'x'"):
        load_config(path, {("cut", "alpha"): "x"})
    with pytest.raises(InputError, match="--seed is -1"):
        make_config({("model", "path"): "org/name", ("seed",): -1})


@pytest.mark.parametrize(
    ("line", "key"),
    [('norm_preserve = "column"', "norm_preserve"), ('embedding = "untie"', "embedding")],
)
def test_a_cut_that_an_adapter_cannot_hold_is_an_error_of_the_configuration(tmp_path, line, key):
    text = MODEL + f"[cut]\n{line}\n"
    assert load_config(_write(tmp_path, text)).output.precision == "same"
    message = _error(tmp_path, text + '[output]\nprecision = "adapter"\n')
    assert f"study.toml, line 4: [cut] {key}" in message and '"adapter" cannot hold' in message
    with pytest.raises(InputError, match="line 4"):
        load_config(_write(tmp_path, text), {("output", "precision"): "adapter"})
    held = MODEL + '[cut]\nembedding = "tied"\n[output]\nprecision = "adapter"\n'
    assert load_config(_write(tmp_path, held)).output.precision == "adapter"


def test_template_arguments_come_from_a_table_or_a_flag(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[model]\npath = "org/name"\nchat_template_args = { enable_thinking = true }\n')
    config = load_config(path)
    assert config.model.chat_template_args == {"enable_thinking": True}
    assert config.to_dict()["model"]["chat_template_args"] == {"enable_thinking": True}
    options = main_parser().parse_args(["m", "--chat-template-args", '{"enable_thinking": true}'])
    values = {("model", "path"): "org/name", **settings(options)}
    assert make_config(values).model.chat_template_args == {"enable_thinking": True}
    options = main_parser().parse_args(["m", "--chat-template-args", "{thinking"])
    with pytest.raises(InputError, match="--chat-template-args is"):
        make_config({("model", "path"): "org/name", **settings(options)})
