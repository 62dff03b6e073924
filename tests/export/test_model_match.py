"""What was measured is what is written: a folder that stores other weights is refused."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx.utils import tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers

import vauban
from tests.conftest import random_tokens
from tests.export.checkpoints import save_checkpoint, sharded, unit
from vauban.errors import InputError

KEYS = ["self_attn.q_proj", "self_attn.v_proj"]


def adapted(model: nn.Module, *, dora: bool = False, keys: list[str] = KEYS) -> nn.Module:
    """`model` with a LoRA or DoRA adapter that changes what it computes."""
    linear_to_lora_layers(
        model, 4, {"rank": 2, "scale": 4.0, "dropout": 0.0, "keys": keys}, use_dora=dora
    )
    for _, module in model.named_modules():
        if "lora_b" in module:
            module.lora_b = 0.05 * mx.random.normal(module.lora_b.shape, key=mx.random.key(1))
    return model.eval()


def fused(model: nn.Module) -> nn.Module:
    """The adapter of `model` put into its matrices, as mlx_lm.fuse does."""
    leaves = [(p, m.fuse()) for p, m in model.named_modules() if "lora_b" in m]
    from mlx.utils import tree_unflatten

    model.update_modules(tree_unflatten(leaves))
    return model


def refused(model: nn.Module, source: Path, out: Path, *words: str) -> None:
    plan = vauban.plan_cut(model, unit())
    with pytest.raises(InputError) as error:
        plan.export(source, out)
    assert not out.exists()
    for word in (*words, "mlx_lm.fuse"):
        assert word in str(error.value)
    with pytest.raises(InputError):
        (out.parent / "empty").mkdir(exist_ok=True)
        plan.write(source, out.parent / "empty")
    assert not list((out.parent / "empty").iterdir())


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_in_memory_is_refused_by_name(tmp_path: Path, bits: int, dora: bool) -> None:
    source = save_checkpoint(tmp_path / "source", "llama", bits=bits)
    model = adapted(vauban.load(source)[0], dora=dora)
    refused(model, source, tmp_path / "out", "layers.0.self_attn.q_proj", "adapter", "5 more")


@pytest.mark.parametrize("bits", [0, 4])
def test_an_adapter_that_was_fused_in_memory_is_refused(tmp_path: Path, bits: int) -> None:
    source = save_checkpoint(tmp_path / "source", "qwen3", bits=bits)
    model = fused(adapted(vauban.load(source)[0]))
    refused(model, source, tmp_path / "out", "8 modules", "layers.0.self_attn.q_proj")


def test_a_change_of_a_writer_itself_is_seen(tmp_path: Path) -> None:
    """The cut rewrites this matrix, and would start from the one that lies in the folder."""
    source = save_checkpoint(tmp_path / "source", "llama")
    model, _ = vauban.load(source)
    model.model.layers[2].mlp.down_proj.weight *= 1.01
    refused(model, source, tmp_path / "out", "1 modules", "layers.2.mlp.down_proj")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.q_proj.bias"])
def test_a_change_of_a_norm_or_a_bias_is_seen(tmp_path: Path, name: str) -> None:
    source = save_checkpoint(tmp_path / "source", "llama_bias")
    model, _ = vauban.load(source)
    module = dict(model.named_modules())[name.rpartition(".")[0]]
    key = name.rpartition(".")[2]
    module[key] = module[key] + 0.01
    refused(model, source, tmp_path / "out", name.rpartition(".")[0])


def test_experts_and_another_models_folder(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "qwen3_moe")
    model, _ = vauban.load(source)
    experts = model.model.layers[1].mlp.switch_mlp.up_proj
    experts.weight = mx.concatenate([experts.weight[:3], experts.weight[3:] * 1.1])
    refused(model, source, tmp_path / "out", "layers.1.mlp.switch_mlp.up_proj")
    other = save_checkpoint(tmp_path / "other", "llama")
    weights = dict(mx.load(str(other / "model.safetensors")))
    key = "model.embed_tokens.weight"
    weights[key] = mx.random.normal(weights[key].shape).astype(mx.bfloat16)
    mx.save_safetensors(str(other / "model.safetensors"), weights, {"format": "mlx"})
    mine = save_checkpoint(tmp_path / "mine", "llama")
    refused(vauban.load(mine)[0], other, tmp_path / "out", "embed_tokens")


def half(model: nn.Module) -> nn.Module:
    model.update(tree_map(lambda v: v.astype(mx.float16), model.parameters()))
    return model


@pytest.mark.parametrize(
    ("name", "bits", "change"),
    [
        ("llama", 0, lambda m: m),
        ("llama", 0, half),
        ("llama", 4, lambda m: m),
        ("qwen3_moe", 0, lambda m: m),
        ("qwen3_moe", 4, lambda m: m),
        ("gemma3_text", 0, lambda m: m),
    ],
)
def test_the_same_weights_in_another_form_match(
    tmp_path: Path, name: str, bits: int, change: Any
) -> None:
    source = save_checkpoint(tmp_path / "source", name, bits=bits)
    plan = vauban.plan_cut(change(vauban.load(source)[0]), unit())
    assert plan.export(source, tmp_path / "out", calibrate=False).ok
    unpacked, _ = vauban.load(source, unpack=True)
    assert vauban.plan_cut(unpacked, unit()).export(source, tmp_path / "b", calibrate=False).ok


@pytest.mark.parametrize("measured", [0, 4])
def test_one_model_in_two_packings_matches(tmp_path: Path, measured: int) -> None:
    """Measured on 4 bits and cut in floats, or the other way round, is what people do."""
    on = save_checkpoint(tmp_path / "on", "llama", bits=measured)
    source = save_checkpoint(tmp_path / "source", "llama", bits=4 - measured)
    plan = vauban.plan_cut(vauban.load(on)[0], unit())
    assert plan.export(source, tmp_path / "out", calibrate=False).ok


def test_shards_match_as_well(tmp_path: Path) -> None:
    source = sharded(save_checkpoint(tmp_path / "one", "llama"), tmp_path / "source", 3)
    assert vauban.plan_cut(vauban.load(source)[0], unit()).export(source, tmp_path / "out").ok


def test_a_fresh_adapter_changes_nothing_and_is_no_difference(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama")
    model, _ = vauban.load(source)
    linear_to_lora_layers(model, 4, {"rank": 2, "scale": 4.0, "dropout": 0.0, "keys": KEYS})
    assert vauban.plan_cut(model.eval(), unit()).export(source, tmp_path / "out").ok


@pytest.mark.parametrize("embedding", ["auto", True])
def test_a_plan_that_was_applied_is_exported_and_a_second_one_is_not(
    tmp_path: Path, embedding: Any
) -> None:
    source = save_checkpoint(tmp_path / "source", "qwen3")
    model, _ = vauban.load(source)
    before = mx.array(model(random_tokens(1, 9)))
    plan = vauban.plan_cut(model, unit(), embedding=embedding)
    plan.apply(model)
    assert float(mx.abs(model(random_tokens(1, 9)) - before).max()) > 0.01
    report = plan.export(source, tmp_path / "out")
    assert report.ok
    written, _ = mlx_lm.load(str(tmp_path / "out"))
    exported, applied = written(random_tokens(1, 9)), model(random_tokens(1, 9))
    assert float(mx.abs(exported - applied).max()) < 0.03 * float(mx.abs(applied).max())
    other = mx.random.normal((64,), key=mx.random.key(9))
    with pytest.raises(InputError, match="is not what"):
        vauban.plan_cut(model, other).export(source, tmp_path / "second")
