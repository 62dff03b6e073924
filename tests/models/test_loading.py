"""Opening models as mlx-lm does, and what is downloaded of a repository."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from huggingface_hub.utils import filter_repo_objects

import vauban
from vauban.models import device_info, folder_of
from vauban.models.loading import DOWNLOADED


@pytest.mark.parametrize("lazy", [False, True])
def test_mlx_lms_own_options_work(lazy: bool) -> None:
    path = vauban.organism_path("4bit")
    model, tokenizer, config = vauban.load(path, return_config=True, lazy=lazy)
    expected, _, their_config = mlx_lm.load(str(path), return_config=True)
    assert config == their_config == json.loads((path / "config.json").read_text())
    tokens = mx.array([vauban.encode_chat(tokenizer, "Hello")])
    assert mx.allclose(model(tokens), expected(tokens), atol=1e-3)
    assert folder_of(model) == path


def test_a_lazy_model_is_not_read_when_it_is_opened(tmp_path: Path) -> None:
    """A weight that is NaN is found at once, or, if the user asked for that, when it is used."""
    folder = tmp_path / "broken"
    shutil.copytree(vauban.organism_path("dense"), folder)
    weights = mx.load(str(folder / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    with pytest.raises(vauban.errors.ModelError, match=r"model\.norm\.weight holds NaN"):
        vauban.load(folder)
    model, tokenizer = vauban.load(folder, lazy=True)
    with pytest.raises(vauban.VaubanError, match="NaN"):
        vauban.generate(model, tokenizer, ["Hello"])


def test_terms_of_use_come_along_with_the_weights() -> None:
    repository = [
        *("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"),
        *("LICENSE", "LICENSE.txt", "LICENCE.md", "NOTICE", "USE_POLICY.md", "README.md"),
        *("pytorch_model.bin", "consolidated.00.pth", "model.gguf", ".gitattributes"),
    ]
    assert list(filter_repo_objects(repository, allow_patterns=list(DOWNLOADED))) == repository[:10]


def test_describe_says_what_load_found_and_what_is_in_memory() -> None:
    model, _ = vauban.load(vauban.organism_path("4bit"))
    info = vauban.describe(model)
    assert info.quantization == "4-bit affine g64" and info.stored_dtype != "none"
    assert info.to_dict()["parameters"] == info.parameters
    bare, _ = mlx_lm.load(str(vauban.organism_path("dense")))
    assert vauban.describe(bare).path == "(in memory)" and not vauban.describe(bare).converted


def test_a_packed_organism_runs_unpacked_where_it_is_asked_to(monkeypatch: Any) -> None:
    if device_info().backend != "cpu":
        pytest.skip("only a CPU unpacks")
    path = vauban.organism_path("4bit")
    unpacked, tokenizer = vauban.load(path, unpack=True)
    packed, _ = vauban.load(path)
    info = vauban.describe(unpacked)
    assert info.converted and info.dtype == "float32" and info.quantization == "4-bit affine g64"
    assert info.bytes > vauban.describe(packed).bytes
    tokens = mx.array([vauban.encode_chat(tokenizer, "Hello")])
    assert mx.allclose(unpacked(tokens), packed(tokens), atol=1e-3)
