"""Where the stream does not get W k as it is: norms behind the MLP, and shared experts' gates."""

import mlx.core as mx
import numpy as np
import pytest

from tests.architectures.build import build, configuration
from vauban.errors import ArchitectureError
from vauban.knowledge import Editor, EditSettings, Fact, collect_key_stats, edited_modules
from vauban.knowledge.post_norms import before_norm, nearest_normed
from vauban.knowledge.reading import check_written, inputs_at_pivots, read_plain
from vauban.knowledge.tokens import Row

NORMED = ["gemma2", "gemma3_text", "olmo2", "glm4", "exaone4"]
SHARED = ["qwen2_moe", "qwen3_next", "deepseek_v2", "glm4_moe", "hunyuan"]
# The subject stands last, so that what the block writes there reaches the logits.
FACTS = [Fact("Where is the {}", word, target) for word, target in (
    ("lamp", "river"), ("chisel", "boat"), ("rope", "paint"),
)]  # fmt: skip
ROWS = [Row((3, 5, 7, 9, 11), 4), Row((8, 2, 30, 31), 3)]


def test_the_nearest_output_of_a_norm_is_the_nearest():
    rng = np.random.default_rng(0)
    gain = rng.standard_normal(6)
    wanted = 4 * rng.standard_normal((5, 6))
    unit = nearest_normed(wanted, gain)
    assert np.linalg.norm(unit, axis=1) == pytest.approx(1.0)
    spread = rng.standard_normal((200_000, 6))
    spread /= np.linalg.norm(spread, axis=1, keepdims=True)
    for row, point in zip(wanted, unit, strict=True):
        near = np.linalg.norm(np.sqrt(6) * gain * point - row)
        others = np.linalg.norm(np.sqrt(6) * gain * spread - row, axis=1).min()
        assert near <= others + 1e-9 and others - near < 0.3
    reachable = np.sqrt(6) * gain * unit
    assert np.abs(np.sqrt(6) * gain * nearest_normed(reachable, gain) - reachable).max() < 1e-9
    output = 3 * rng.standard_normal((5, 6))
    before = np.sqrt(6) * gain * output / np.linalg.norm(output, axis=1, keepdims=True)
    assert np.abs(before_norm(reachable - before, output, gain) + output).max() < 1e3
    after = output + before_norm(reachable - before, output, gain)
    assert np.linalg.norm(after, axis=1) == pytest.approx(np.linalg.norm(output, axis=1))
    normed = np.sqrt(6) * gain * after / np.linalg.norm(after, axis=1, keepdims=True)
    assert np.abs(normed - reachable).max() < 1e-9


@pytest.mark.parametrize("family", NORMED + SHARED)
def test_the_stream_grows_by_what_was_computed(family):
    """One change of the matrix, seen in the forward pass behind the block."""
    model = build(family)
    layer = len(model.layers) - 1
    module = edited_modules(model, [layer])[layer]
    assert (module.norm is not None) == (family in NORMED)
    assert ("shared" in module.path) == (family in SHARED)
    check_written(model, module)
    inputs, before = inputs_at_pivots(model, ROWS, module.paths, layer + 1)
    _, normed = read_plain(model, ROWS, module, layer + 1)
    keys = np.array(module.keys(inputs), dtype=np.float64)
    rng = np.random.default_rng(0)
    size = np.linalg.norm(before, axis=1, keepdims=True) / np.sqrt(before.shape[1])
    wanted = 0.3 * size * rng.standard_normal(before.shape)
    residual = module.residual(wanted, normed)
    delta = residual.T @ np.linalg.solve(keys @ keys.T, keys)
    matrix = module.module
    matrix.weight = matrix.weight + mx.array(delta.astype(np.float32))
    _, after = inputs_at_pivots(model, ROWS, [module.path], layer + 1)
    expected = wanted
    if normed is not None:
        expected = module.written(residual, normed + residual) - module.written(residual, normed)
        cosine = (expected * wanted).sum(1) / np.linalg.norm(expected, axis=1)
        assert (cosine > 0.3 * np.linalg.norm(wanted, axis=1)).all()
    assert np.abs(after - before - expected).max() <= 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "glm4", "qwen2_moe", "deepseek_v2"])
def test_an_edit_teaches_them(family, organism):
    tokenizer = organism[1]
    vocabulary = int(organism[0].model.embed_tokens.weight.shape[0])
    model = build(family, config={**configuration(family), "vocab_size": vocabulary})
    layer = len(model.layers) - 2
    stats = collect_key_stats(model, tokenizer, [fact.text for fact in FACTS], [layer])
    options = {"steps": 20, "clamp": 9.0, "weight_decay": 0.0, "method": "ridge", "l2": 1e-3}
    settings = EditSettings(layers=[layer], **options)
    report = Editor(model, tokenizer, settings, stats, contexts=["{}"]).edit(FACTS)
    assert all(fact.after > 2 * fact.before for fact in report.facts)


@pytest.mark.parametrize("family", ["nanbeige", "talkie", "deepseek_v41"])
def test_a_block_whose_matrix_reaches_the_stream_otherwise_is_refused(family):
    model = build(family)
    layer = len(model.layers) - 1
    module = edited_modules(model, [layer])[layer]
    with pytest.raises(ArchitectureError, match="does not reach the stream as vauban knows it"):
        check_written(model, module)


@pytest.mark.parametrize(
    "family, what", [("qwen3_moe", "MLP is expert"), ("gemma4_text@moe", "MLP is expert, mlp")]
)
def test_what_is_routed_is_refused_by_name(family, what):
    model = build(family)
    with pytest.raises(ArchitectureError, match=f"block . cannot hold a fact: its {what}"):
        edited_modules(model, [len(model.layers) - 1])
