"""A language model with a vision tower, saved by transformers, cut, opened by mlx-vlm."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

import vauban

_TEXT = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                        "mrope_section": [4, 2, 2], "mrope_interleaved": True},
}  # fmt: skip
_VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip


def saved_by_transformers(folder: Path) -> Path:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3VLConfig(
        text_config=_TEXT, vision_config=_VISION, image_token_id=150, video_token_id=151,
        vision_start_token_id=152, vision_end_token_id=153, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3VLForConditionalGeneration(config).float().save_pretrained(folder)
    for file in vauban.organism_path("dense").glob("tokenizer*"):
        shutil.copy(file, folder)
    # What published folders say and transformers 5 leaves out for a fresh configuration.
    file = folder / "config.json"
    written = json.loads(file.read_text())
    text, vision = written["text_config"], written["vision_config"]
    text |= {"tie_word_embeddings": False, "rope_theta": 10000.0,
             "rope_scaling": text["rope_parameters"]}  # fmt: skip
    vision["model_type"] = "qwen3_vl"
    file.write_text(json.dumps(written))
    return folder


def test_mlx_vlm_opens_what_was_cut(tmp_path: Path) -> None:
    mlx_vlm = pytest.importorskip("mlx_vlm.utils", reason="mlx-vlm is not installed")
    source = saved_by_transformers(tmp_path / "source")
    model, _ = vauban.load(source)
    direction = mx.random.normal((64,), key=mx.random.key(0))
    plan = vauban.plan_cut(model, direction / mx.linalg.norm(direction), embedding=False)
    report = plan.export(source, tmp_path / "out")
    assert report.ok and report.layout == "same" and not report.notes
    tokens = mx.array([[1, 5, 7, 9]])
    before, after = (
        np.array(load_model(folder)[0](tokens)) for folder in (source, tmp_path / "out")
    )
    seen = np.array(mlx_vlm.load_model(tmp_path / "out")(tokens).logits)
    assert np.abs(seen - after).max() < 1e-4 < np.abs(after - before).max()
