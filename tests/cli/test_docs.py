"""The README's code runs as it is printed."""

import re

from tests.docs.blocks import ROOT, blocks_of


def test_the_library_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = dict(blocks_of(ROOT / "README.md"))
    exec(compile(blocks["python"], "README.md", "exec"), {})
    assert (tmp_path / "output" / "model.safetensors").is_file()


def test_the_commands_of_the_readme_are_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"^make (\w+)", text, re.MULTILINE)) == {"demo", "test"} <= set(targets)
