"""Memory while exporting a checkpoint that mlx-lm converts: a few tensors at a time, never all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

import vauban
from tests.export.checkpoints import load_plain
from vauban._arrays import flat_parameters
from vauban.export.source import Source, open_source
from vauban.export.tensor_files import TensorOnDisk, stored_tensors

_CONFIG = {
    "model_type": "qwen3_moe", "hidden_size": 512, "intermediate_size": 512,
    "moe_intermediate_size": 512, "num_hidden_layers": 11, "num_experts": 16,
    "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "vocab_size": 20_000, "tie_word_embeddings": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "norm_topk_prob": True, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "max_position_embeddings": 512,
}  # fmt: skip
# MB above the largest tensor: blocks are float32.
_ROOM = 200
_EXPORT = """
import sys, vauban, vauban.export, mlx.core as mx
from mlx_lm.utils import load_model
from pathlib import Path

def memory(what):
    facts = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(facts[what].split()[0]) * 1024

# The model is compared with the folder, so it is there; what the export adds is counted.
model, _ = load_model(Path(sys.argv[1]))
mx.eval(model.parameters())
loaded = memory("VmHWM")
plan = vauban.plan_cut(model, mx.random.normal((512,), key=mx.random.key(0)), embedding=True)
report = plan.export(sys.argv[1], sys.argv[2])
assert report.ok and report.untouched_identical
print(memory("VmHWM") - loaded)
"""


def one_by_one(folder: Path, config: dict[str, object]) -> Path:
    """Random weights with every expert's matrices by themselves, as Hugging Face names them."""
    from mlx_lm.models import qwen3_moe

    shapes = flat_parameters(qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(config)))
    weights = {}
    for name, like in shapes.items():
        value = (0.02 * mx.random.normal(like.shape)).astype(mx.bfloat16)
        if "switch_mlp" in name:
            for e in range(like.shape[0]):
                weights[name.replace("switch_mlp", f"experts.{e}")] = value[e]
        else:
            weights[name] = value
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's /proc")
def test_a_checkpoint_that_is_converted_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    """Experts stored one by one, and a head that shares the embedding and gets a copy of it."""
    source = one_by_one(tmp_path / "source", _CONFIG)
    done = subprocess.run(
        [sys.executable, "-c", _EXPORT, str(source), str(tmp_path / "out")],
        # Each thread of OpenBLAS has buffers of its own.
        env={**os.environ, "OPENBLAS_NUM_THREADS": "2"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sizes = [t.end - t.start for t in stored_tensors(tmp_path / "out").values()]
    assert "lm_head.weight" in stored_tensors(tmp_path / "out")
    assert sum(sizes) > 300e6
    assert int(done.stdout) < max(sizes) + _ROOM * 1e6


def overwrite_end(tensor: TensorOnDisk, last: bytes) -> bytes:
    """Put other bytes at the end of a tensor in its file; returns what was there."""
    with tensor.file.open("r+b") as file:
        file.seek(tensor.end - len(last))
        before = file.read(len(last))
        file.seek(tensor.end - len(last))
        file.write(last)
    return before


def test_of_a_converted_checkpoint_every_bit_is_compared(tmp_path: Path) -> None:
    """The sign of one zero, in an expert and in the head that is a copy of the embedding."""
    small = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    source = one_by_one(tmp_path / "source", {**_CONFIG, **small, "vocab_size": 160})
    stored = stored_tensors(source)
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.experts.15.up_proj.weight"):
        overwrite_end(stored[name], bytes(2))
    out = tmp_path / "out"
    vauban.plan_cut(load_plain(source), mx.ones(64), embedding=True).export(source, out)
    written = stored_tensors(out)
    for name in ("lm_head.weight", "model.layers.1.mlp.switch_mlp.up_proj.weight"):
        assert overwrite_end(written[name], b"\x00\x80") == bytes(2)
        assert vauban.verify_export(out, source=source).differs == name
        overwrite_end(written[name], bytes(2))
    assert vauban.verify_export(out, source=source).untouched_identical is True


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = [mx.ones(2), mx.full((2,), 2.0)]
        self.inner = nn.Linear(2, 2)


def test_what_is_released_is_held_by_nobody(tmp_path: Path) -> None:
    model = Nested()
    source = Source(tmp_path, {}, model, flat_parameters(model), {}, {}, False)
    assert source.take("tables.1").tolist() == [2.0, 2.0]
    assert source.parameters["tables.1"].shape == model.tables[1].shape == ()
    assert model.tables[0].shape == (2,)
    source.release("inner")
    assert {value.shape for value in flat_parameters(model.inner).values()} == {()}
    assert source.parameters["inner.bias"] is model.inner.bias
    folder = one_by_one(tmp_path / "moe", {**_CONFIG, "num_hidden_layers": 1, "vocab_size": 160})
    opened = open_source(folder)
    name = "model.layers.0.mlp.switch_mlp.up_proj.weight"
    assert not opened.same_layout and opened.take(name).shape == (16, 512, 512)
    assert opened.modules[name.removesuffix(".weight")].weight.size == 1
