"""The affine cut: the projection of every residual is the value asked for, however made."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import vauban
from tests.conftest import random_tokens
from vauban.edits.affine_cut import harmless_values, projection_values

VALUES = [0.5, -1.0, 2.0, 2.0, -3.5]


def unit(d: int = 64, seed: int = 3) -> mx.array:
    v = np.random.default_rng(seed).normal(size=d)
    return mx.array((v / np.linalg.norm(v)).astype(np.float32))


def projections(model: Any, direction: mx.array, interventions: Any = ()) -> np.ndarray:
    """(L+1, tokens) of two prompts, all positions."""
    out = vauban.forward(
        model, random_tokens(2, 9), positions="all", interventions=interventions, logits=False
    )
    return np.array(
        (out.residual @ direction).transpose(1, 0, 2).reshape(out.residual.shape[1], -1)
    )


@pytest.mark.parametrize("way", ["weights", "run time"])
def test_every_residual_has_its_value(tiny: Any, way: str) -> None:
    model, d = tiny("llama_bias"), unit()
    plan = vauban.plan_cut(model, d, set_to=dict(enumerate(VALUES)))
    virtual = plan.virtual()
    if way == "weights":
        model, virtual = plan.apply(model), ()
    found = projections(model, d, virtual)
    assert np.abs(found - np.array(VALUES)[:, None]).max() < 1e-4


def test_weights_equal_the_run_time_form(tiny: Any) -> None:
    model, d = tiny("llama_bias"), unit()
    plan = vauban.plan_cut(model, d, set_to=dict(enumerate(VALUES)))
    tokens = random_tokens(1, 11)
    virtual = vauban.forward(model, tokens, interventions=plan.virtual()).logits
    assert mx.abs(virtual - vauban.forward(model, tokens).logits).max().item() > 1e-2
    written = vauban.forward(plan.apply(model), tokens).logits
    assert mx.abs(written - virtual).max().item() < 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma", "qwen3"])
def test_one_value_needs_no_bias(tiny: Any, name: str) -> None:
    """The embedding's rows carry it; Gemma's enter the stream times 8, Qwen's head is untied."""
    model, d = tiny(name), unit()
    if name == "gemma":
        with pytest.raises(vauban.InputError, match="embedding that is tied"):
            vauban.plan_cut(model, d, set_to=-2.5)
        return
    plan = vauban.plan_cut(model, d, set_to=-2.5)
    run_time = projections(model, d, plan.virtual())
    written = projections(plan.apply(model), d)
    assert np.abs(run_time + 2.5).max() < 1e-4 and np.abs(written + 2.5).max() < 1e-4


def test_without_a_bias_it_is_a_run_time_matter_and_said(tiny: Any) -> None:
    with pytest.raises(vauban.InputError, match=r"no bias behind its MLP.*AblateTo"):
        vauban.plan_cut(tiny("llama"), unit(), set_to=dict(enumerate(VALUES)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.5}, "has 0.5"),
        ({"components": ("attention",)}, r"down_proj has 0 "),
        ({"components": {"attention": 1.0, "mlp": 0.5}}, r"down_proj has 0.5 "),
        ({"layer_weights": {2: 0.5}}, r"layers\.2.*has 0.5 "),
        ({"norm_preserve": "column"}, "norm_preserve"),
        ({"embedding": False}, "kept"),
        ({"set_to": {0: 1.0}}, "the last one among them"),
        ({"set_to": {9: 1.0}}, "expected some of 0 to 4"),
        ({"set_to": "harmless"}, "DirectionResult"),
    ],
)
def test_bad_input(tiny: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(vauban.InputError, match=message):
        vauban.plan_cut(tiny("llama_bias"), unit(), **{"set_to": 1.0, **options})


def test_harmless_stands_for_the_class_means() -> None:
    """Their projections at residuals 1 to L; residual 0 takes the next one's."""
    path = vauban.organism_path("dense")
    model, tokenizer = vauban.load(path)
    sets = [vauban.load_prompts(path / f"prompts/{n}.jsonl")[:12] for n in ("harmful", "harmless")]
    result = vauban.measure(model, tokenizer, *sets, layer=3)
    values = harmless_values(result)
    by_hand = np.array(result.means[0], np.float64) @ np.array(result.direction, np.float64)
    assert list(values) == list(range(1, 7))
    assert np.allclose(list(values.values()), by_hand, atol=1e-3)
    assert projection_values(values, 6) == [values[1], *values.values()]
    with pytest.raises(vauban.InputError, match="no bias behind its MLP"):
        vauban.plan_cut(model, result, set_to="harmless")


def test_the_harmless_mean_on_the_organism_written_and_read_back(tmp_path: Path) -> None:
    """One value for all residuals of a model without biases: exported, nothing else is left."""
    path = vauban.organism_path("dense")
    model, tokenizer = vauban.load(path)
    harmful = vauban.load_prompts(path / "prompts/harmful.jsonl")
    harmless = vauban.load_prompts(path / "prompts/harmless.jsonl")
    result = vauban.measure(model, tokenizer, harmful, harmless, layer=3)
    value = float((result.harmless_mean(3) * result.direction).sum())
    plan = vauban.plan_cut(model, result, set_to=value)
    report = plan.export(path, tmp_path / "out", precision="float")
    # The rows are stored in bfloat16: what is left is their rounding.
    assert report.direction_left < 2e-2
    checked = vauban.verify_export(tmp_path / "out", source=path, plan=plan)
    assert checked.direction_left < 2e-2 and checked.logits_difference < 0.05
    written, _ = vauban.load(tmp_path / "out")
    along = vauban.collect_activations(written, tokenizer, harmful[:4]).values @ result.direction
    assert np.abs(np.array(along) - value).max() < 0.05 * max(abs(value), 1.0)
    answers = vauban.generate(written, tokenizer, harmful[:8], max_tokens=20)
    assert sum(map(vauban.is_refusal, answers)) <= 1
