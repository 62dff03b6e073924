"""Tiny checkpoints on disk as mlx-lm would have saved them, and independent readings of them."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm

import vauban
from tests.conftest import build
from vauban._arrays import flat_parameters


def unit(size: int = 64) -> mx.array:
    d = mx.random.normal((size,), key=mx.random.key(3))
    return d / mx.linalg.norm(d)


def save_checkpoint(
    folder: Path, name: str, *, bits: int = 0, dtype: mx.Dtype = mx.bfloat16, shards: int = 1
) -> Path:
    """A tiny model as mlx-lm would have saved it, with the organism's tokenizer."""
    model = build(name)
    config = {"model_type": name.split("_bias")[0], **vars(model.args)}
    config = {k: v for k, v in config.items() if isinstance(v, int | float | str | bool | list)}
    config["num_hidden_layers"], config["vocab_size"] = 4, 160
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
        config["quantization"] = {"group_size": 32, "bits": bits}
    folder.mkdir(parents=True)
    weights = {
        k: v.astype(dtype) if mx.issubdtype(v.dtype, mx.floating) else v
        for k, v in flat_parameters(model).items()
    }
    save_shards(folder, weights, shards)
    (folder / "config.json").write_text(json.dumps(config))
    for file in vauban.organism_path("dense").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def shortened(kind: str, folder: Path, blocks: int) -> Path:
    """An organism's first blocks, as a model of its own."""
    shutil.copytree(vauban.organism_path(kind), folder)
    weights = mx.load(str(folder / "model.safetensors"))
    past = tuple(f"model.layers.{block}." for block in range(blocks, 64))
    mx.eval(weights)
    kept = {name: value for name, value in weights.items() if not name.startswith(past)}
    mx.save_safetensors(str(folder / "model.safetensors"), kept, {"format": "mlx"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": blocks}))
    return folder


def sharded(source: Path, folder: Path, shards: int) -> Path:
    """The checkpoint of one file in several, with an index."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_shards(folder, dict(mx.load(str(source / "model.safetensors"))), shards)
    return folder


def save_shards(folder: Path, weights: dict[str, mx.array], shards: int, kind: str = "mlx") -> None:
    """The weights in one file, or in several with an index."""
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": kind})
        return
    names = sorted(weights)
    index = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: weights[n] for n in names[i::shards]}
        index |= dict.fromkeys(part, file)
        mx.save_safetensors(str(folder / file), part, {"format": kind})
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def matrix_of(module: nn.Module) -> mx.array:
    """The float32 matrix of a plain or packed module, by mlx's own kernel."""
    if "scales" not in module:
        return module.weight.astype(mx.float32)
    return mx.dequantize(
        module.weight,
        module.scales.astype(mx.float32),
        module.biases.astype(mx.float32),
        group_size=module.group_size,
        bits=module.bits,
    )


def load_plain(folder: Path) -> nn.Module:
    """As any user of mlx-lm opens it."""
    return mlx_lm.load(str(folder))[0]
