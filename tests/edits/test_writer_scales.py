"""What the weights alone say of each writer's strongest coordinate, against NumPy."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from vauban.edits import writer_scales
from vauban.models import residual_writers

from ..conftest import build


def test_rows_times_gains_against_numpy() -> None:
    model = build("gemma3_text")
    model.layers[2].post_feedforward_layernorm.weight[9] = 120.0
    modules = dict(model.named_modules())
    scales, unread = writer_scales(model)
    assert unread == []
    for scale, writer in zip(scales, residual_writers(model), strict=True):
        W = np.array(modules[writer.path].weight, dtype=np.float64)
        rows = np.linalg.norm(W, axis=0 if writer.kind == "embedding" else 1)
        gain = np.ones(len(rows)) if writer.gain is None else np.abs(np.array(writer.gain))
        both = rows * gain
        top = int(both.argmax())
        assert (scale.path, scale.coordinate) == (writer.path, top)
        assert np.isclose(scale.ratio, both[top] / np.median(both), rtol=1e-4)
        assert np.isclose(scale.row_ratio, rows[top] / np.median(rows), rtol=1e-4)
        assert np.isclose(scale.gain_ratio, gain[top] / np.median(gain), rtol=1e-4)
    assert [(s.layer, s.coordinate) for s in scales if s.loud] == [(2, 9)]


@pytest.mark.parametrize("packed", [False, True])
def test_a_loud_row_of_a_writer_and_of_experts(packed: bool) -> None:
    llama, mixture = build("llama"), build("qwen3_moe")
    llama.layers[1].self_attn.o_proj.weight[5] *= 100.0
    llama.model.embed_tokens.weight[:, 7] *= 60.0
    experts: Any = mixture.layers[3].mlp.switch_mlp.down_proj
    experts.weight = mx.concatenate(
        [experts.weight[:, :11], 80.0 * experts.weight[:, 11:12], experts.weight[:, 12:]], axis=1
    )
    found = []
    for model in (llama, mixture):
        if packed:
            nn.quantize(model, group_size=32, bits=4)
        scales, unread = writer_scales(model)
        assert unread == []
        found += [(s.path.split(".")[-1], s.layer, s.coordinate) for s in scales if s.loud]
    assert found == [("embed_tokens", -1, 7), ("o_proj", 1, 5), ("down_proj", 3, 11)]
