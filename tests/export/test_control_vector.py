"""GGUF control vectors, read back with the gguf package and applied as llama.cpp applies them."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.base import create_attention_mask

import vauban
from tests.conftest import build, random_tokens
from vauban.cli import main

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def result() -> vauban.DirectionResult:
    path = vauban.organism_path("dense")
    model, tokenizer = vauban.load(path)
    sets = [
        vauban.load_prompts(path / "prompts" / f"{n}.jsonl")[:12] for n in ("harmful", "harmless")
    ]
    return vauban.measure(model, tokenizer, *sets, layer=2)


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    reader = gguf.GGUFReader(path)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    return {t.name: np.array(t.data) for t in reader.tensors}, facts


def test_the_tensors_are_those_that_llama_cpp_reads(tmp_path: Path, result) -> None:
    file = vauban.export_control_vector(result, tmp_path / "refusal.gguf", model_type="mistral")
    tensors, facts = read(file)
    assert facts["general.architecture"] == "controlvector"
    assert facts["controlvector.model_hint"] == "llama"
    assert facts["controlvector.layer_count"] == 5
    assert list(tensors) == [f"direction.{n}" for n in range(1, 6)]
    for n in range(1, 6):
        vector = tensors[f"direction.{n}"]
        assert vector.dtype == np.float32 and vector.shape == (128,)
        means = np.array(result.means)
        assert np.allclose(vector, means[1, n] - means[0, n], atol=1e-4)
    assert [p.name for p in tmp_path.iterdir()] == ["refusal.gguf"]
    one = vauban.export_control_vector(result, tmp_path / "one.gguf", layers=[2], scale=-0.5)
    assert np.allclose(read(one)[0]["direction.2"], -0.5 * tensors["direction.2"])


def test_added_after_its_block_it_is_what_add_does(tmp_path: Path, result) -> None:
    """A loop over the blocks that adds `direction.N` to the output of block N, N from 0."""
    model = build("llama")
    rng = np.random.default_rng(0)
    table = rng.normal(size=(4, 64)).astype(np.float32)
    tensors, _ = read(vauban.export_control_vector(table, tmp_path / "all.gguf"))
    tokens = random_tokens(1, 7)
    h = model.model.embed_tokens(tokens)
    mask = create_attention_mask(h, None)
    for n, block in enumerate(model.model.layers):
        h = block(h, mask, None)
        if f"direction.{n}" in tensors:
            h = h + 0.3 * mx.array(tensors[f"direction.{n}"])
    expected = model.lm_head(model.model.norm(h))
    changes = [vauban.Add(mx.array(table[n]), 0.3, n + 1) for n in (1, 2, 3)]
    found = vauban.forward(model, tokens, interventions=changes, positions=None).logits
    assert mx.allclose(found, expected, atol=1e-4)
    # A layer range of the chosen block alone is `Add.from_result`.
    add = vauban.Add.from_result(result, 1.0)
    vector = read(vauban.export_control_vector(result, tmp_path / "r.gguf"))[0]["direction.2"]
    assert add.layer == 3 and np.allclose(np.array(add.direction) * add.scale, vector, atol=1e-4)


def test_one_vector_and_what_is_none(tmp_path: Path, result) -> None:
    d = np.arange(8.0)
    tensors, _ = read(vauban.export_control_vector(d, tmp_path / "d.gguf", layers=[1, 3]))
    assert {n: v.tolist() for n, v in tensors.items()} == {
        "direction.1": d.tolist(), "direction.3": d.tolist()
    }  # fmt: skip
    for wrong, options, expected in [
        (d, {}, "needs layers="),
        (result, {"layers": [0]}, "blocks 1 to 5"),
        (result, {"layers": [6]}, "block 6 gets no control vector"),
        (np.zeros((3, 4)), {}, "zero, NaN or inf"),
        ("words", {}, "a str is no direction"),
        (np.ones((2, 3, 4)), {}, "expected \\(d,\\) or \\(L, d\\)"),
    ]:
        with pytest.raises(vauban.InputError, match=expected):
            vauban.export_control_vector(wrong, tmp_path / "x.gguf", **options)
    with pytest.raises(vauban.InputError, match=r"saved as FILE\.gguf"):
        vauban.export_control_vector(result, tmp_path / "x.safetensors")
    with pytest.raises(vauban.InputError, match="does not exist"):
        vauban.export_control_vector(result, tmp_path / "no" / "x.gguf")
    assert not (tmp_path / "x.gguf").exists() and not list(tmp_path.glob(".*"))


def test_measure_writes_one_beside_the_direction(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(vauban.organism_path("dense"))
    flags = ["measure", "--model", path, "--layer", "2", "-o", "d.safetensors"]
    assert main([*flags, "--gguf", "d.bin"]) == 2
    assert "saved as FILE.gguf" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert main([*flags, "--gguf", "d.gguf"]) == 0
    said = capsys.readouterr().out
    assert "--control-vector-scaled d.gguf:1 --control-vector-layer-range 2 2" in said
    saved = vauban.DirectionResult.load("d.safetensors")
    assert np.allclose(
        read(Path("d.gguf"))[0]["direction.2"],
        float(saved.norms[2]) * np.array(saved.direction), atol=1e-5,
    )  # fmt: skip
    assert main([*flags[:-1], "e.safetensors", "--gguf", "d.gguf"]) == 2
    assert "d.gguf exists" in capsys.readouterr().err
