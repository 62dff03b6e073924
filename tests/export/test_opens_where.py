"""The load matrix: a program opens what the report says it opens, and refuses the rest."""

import importlib.util
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

import vauban
from tests.export.load_matrix import KINDS, READERS, TOKENS, Kind, Refused, open_as_swift
from vauban.cli import main

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_program_opens_what_is_said_and_nothing_else(tmp_path: Path, kind: Kind) -> None:
    source, folder, plan, report = kind.export(tmp_path)
    assert report.ok
    if kind.precision == "adapter":
        expected = vauban.forward(
            plan.model, mx.array(TOKENS), interventions=plan.virtual(), positions=None
        ).logits
    else:
        expected = load_model(folder)[0](mx.array(TOKENS))
    for program in READERS:
        if not program.installed:
            continue
        if program.name not in report.programs:
            with pytest.raises(Refused):
                program.read(folder, source)
            continue
        logits = program.read(folder, source)
        if logits is not None:
            assert np.abs(logits - np.array(expected)).max() < 1e-4, program.name


def test_a_whole_runs_folder_opens_in_swift_apps(tmp_path: Path) -> None:
    """Card, direction, answers and records lie beside the weights of quick mode."""
    source, out = vauban.organism_path("dense"), tmp_path / "out"
    flags = ["--num-prompts", "4", "--max-tokens", "6", "--no-controls", "--layer", "2"]
    assert main([str(source), "-o", str(out), "--alpha", "1", *flags]) == 0
    assert [f.name for f in out.rglob("*.safetensors")] == ["model.safetensors"]
    logits = open_as_swift(out, source)
    tokens = mx.array(TOKENS)
    assert np.array_equal(logits, np.array(load_model(out)[0](tokens).astype(mx.float32)))
    card = (out / "README.md").read_text()
    assert "Opens in: mlx-lm, MLX Swift apps, transformers, llama.cpp's converter." in card


def test_the_page_is_what_its_script_makes(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("opens", DOCS / "generate_opens_page.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (DOCS / "opens-where.md").read_text(encoding="utf-8") == script.page(tmp_path)
