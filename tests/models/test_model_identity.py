"""A direction knows its model: other weights are warned of, other shapes and tokenizers refused."""

import json
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

import vauban
from tests.conftest import build, random_tokens
from tests.export.checkpoints import save_checkpoint
from vauban.errors import InputError, VaubanWarning
from vauban.models import check_measured_on, fingerprint
from vauban.quick import probe_prompt, scan, steer_prompt


def result_on(model: nn.Module, tokenizer: Any = None) -> vauban.DirectionResult:
    """A direction that says it was measured on `model`."""
    width, blocks = vauban.describe(model).d_model, len(model.layers)
    units = mx.random.normal((blocks, width), key=mx.random.key(4))
    units = units / mx.linalg.norm(units, axis=-1, keepdims=True)
    return vauban.DirectionResult(
        direction=units[1], layer_index=1, cosine_scores=[0.0] * blocks, d_model=width,
        model_path="org/model", directions=units, norms=mx.ones((blocks,)),
        means=mx.zeros((2, blocks, width)), projections={"harmless": 0.0, "harmful": 1.0},
        scores={}, position=-1, method="mean_difference",
        fingerprint=fingerprint(model, tokenizer),
    )  # fmt: skip


def cast(model: nn.Module, dtype: mx.Dtype) -> nn.Module:
    model.update(
        tree_map(
            lambda v: v.astype(dtype) if mx.issubdtype(v.dtype, mx.floating) else v,
            model.parameters(),
        )
    )
    return model


def silent(result: Any, model: nn.Module, tokenizer: Any = None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_measured_on(result, model, tokenizer)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3_text"])
def test_the_same_weights_in_another_form_are_the_same_model(tmp_path: Path, name: str) -> None:
    folder = save_checkpoint(tmp_path / "float", name)
    packed = save_checkpoint(tmp_path / "packed", name, bits=4)
    model, tokenizer = vauban.load(folder)
    result = result_on(model, tokenizer)
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        silent(result, cast(vauban.load(folder)[0], dtype), tokenizer)
    four = vauban.load(packed)[0]
    silent(result, four, tokenizer)
    silent(result_on(four, tokenizer), model, tokenizer)
    silent(result_on(four, tokenizer), vauban.load(packed, unpack=True)[0], tokenizer)


@pytest.mark.parametrize("bits", [0, 4])
def test_other_weights_of_one_shape_warn(tmp_path: Path, bits: int) -> None:
    result = result_on(build("llama"))
    other = build("llama", seed=1)
    if bits:
        nn.quantize(other, 32, bits)
    with pytest.warns(VaubanWarning, match=r"measured on other weights: 'org/model'"):
        plan = vauban.plan_cut(other, result)
    assert plan.updates
    silent(result.direction, other)
    tuned = build("llama")
    for block in tuned.model.layers:
        block.mlp.down_proj.weight *= 1.02
    with pytest.warns(VaubanWarning, match="other weights"):
        check_measured_on(result, tuned)


def test_another_shape_is_refused() -> None:
    result = result_on(build("llama"))
    for changes in ({"num_hidden_layers": 3}, {"hidden_size": 32}):
        with pytest.raises(InputError, match=r"4 blocks, width 64.*result\.direction"):
            check_measured_on(result, build("llama", **changes))
    with pytest.raises(InputError, match="4 blocks, width 64"):
        vauban.plan_cut(build("llama", num_hidden_layers=3), result)
    assert vauban.plan_cut(build("llama", num_hidden_layers=3), result.direction).updates


def test_another_tokenizer_is_refused(organism: tuple[nn.Module, Any], tmp_path: Path) -> None:
    model, tokenizer = organism
    result = result_on(model, tokenizer)
    silent(result, model, tokenizer)
    folder = tmp_path / "other"
    folder.mkdir()
    for file in vauban.organism_path("dense").iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    text = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(text))
    other = vauban.load(folder)[1]
    uses: list[Any] = [
        lambda: probe_prompt(model, other, "Hello", result),
        lambda: scan(model, other, "Hello", result),
        lambda: steer_prompt(model, other, "Hello", result, max_tokens=2),
    ]
    for use in uses:
        with pytest.raises(InputError, match="another tokenizer"):
            use()


def test_a_measured_direction_keeps_it_in_its_file(
    organism: tuple[nn.Module, Any], measured: vauban.DirectionResult, tmp_path: Path
) -> None:
    model, tokenizer = organism
    read = vauban.DirectionResult.load(measured.save(tmp_path / "d.safetensors"))
    assert read.fingerprint is not None and measured.fingerprint is not None
    assert read.fingerprint.facts() == measured.fingerprint.facts()
    assert np.array_equal(read.fingerprint.matrices, measured.fingerprint.matrices)
    silent(read, model, tokenizer)
    json.dumps(read.to_dict())


def test_a_file_without_one_works_silently(
    organism: tuple[nn.Module, Any], measured: vauban.DirectionResult, tmp_path: Path
) -> None:
    old = replace(measured, fingerprint=None)
    read = vauban.DirectionResult.load(old.save(tmp_path / "old.safetensors"))
    assert read.fingerprint is None
    silent(read, organism[0], organism[1])


def test_it_is_cheap(organism: tuple[nn.Module, Any]) -> None:
    fingerprint(*organism)
    start = time.perf_counter()
    fingerprint(*organism)
    assert time.perf_counter() - start < 0.2


def test_models_of_other_vocabularies_are_not_compared(organism: tuple[nn.Module, Any]) -> None:
    model, tokenizer = organism
    other = build("llama")
    prompts = ["Name a colour.", "Say hello.", "Count to ten."]
    fact = vauban.Fact("Where is the {} ?", "lamp", "river", "house")
    uses: list[Any] = [
        lambda: vauban.evaluate(model, other, tokenizer, prompts, harmless=prompts),
        lambda: vauban.kl_divergence(model, other, tokenizer, prompts),
        lambda: vauban.kl_divergence(other, model, tokenizer, prompts),
        lambda: vauban.hidden_shift(model, other, tokenizer, prompts, 1),
        lambda: vauban.evaluate_facts(model, other, tokenizer, [fact]),
    ]
    size = model.args.vocab_size
    for use in uses:
        with pytest.raises(InputError, match=rf"\b{size} tokens.*\b160|\b160 tokens.*\b{size}"):
            use()


def test_streams_of_other_widths_are_not_compared(organism: tuple[nn.Module, Any]) -> None:
    model, tokenizer = organism
    other = build("llama", vocab_size=model.args.vocab_size)
    with pytest.raises(InputError, match=r"width 128.* width 64"):
        vauban.hidden_shift(model, other, tokenizer, ["a", "b", "c"], 1)
    assert other(random_tokens(1, 3)).shape[-1] == model.args.vocab_size
