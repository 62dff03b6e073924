"""Collection: prefix reuse and batches against the per-prompt loop; streaming moments."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vauban
from vauban.activations import ActivationMoments, stream_activations


@pytest.mark.parametrize("positions", [(-1,), (-4, -2, -1)])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_collection_equals_the_per_prompt_loop(
    organism: Any, organism_prompts: Any, positions: tuple[int, ...], batch_size: int | None
) -> None:
    model, tokenizer = organism
    prompts = organism_prompts["harmful"][:7] + organism_prompts["harmless"][:8]
    found = vauban.collect_activations(
        model, tokenizer, prompts, positions=positions, batch_size=batch_size
    )
    assert found.values.shape == (15, len(model.layers) + 1, len(positions), 128)
    for i, prompt in enumerate(prompts):
        tokens = mx.array([vauban.encode_chat(tokenizer, prompt)])
        alone = vauban.forward(model, tokens, positions=positions, logits=False).residual[0]
        assert mx.abs(found.values[i] - alone).max().item() <= 1e-4 * float(mx.abs(alone).max())
    last = found.at(2)
    assert mx.array_equal(last, found.values[:, 2, positions.index(-1)])
    with pytest.raises(vauban.InputError, match="was not collected"):
        found.at(2, -9)


def test_interventions_reach_the_shared_prefix(organism: Any, organism_prompts: Any) -> None:
    """The prefix is read under the interventions too: ablated residuals are empty everywhere."""
    model, tokenizer = organism
    d = mx.random.normal((128,), key=mx.random.key(0))
    found = vauban.collect_activations(
        model, tokenizer, organism_prompts["harmful"][:6], interventions=[vauban.Ablate(d)]
    ).values
    alone = vauban.forward(
        model,
        mx.array([vauban.encode_chat(tokenizer, organism_prompts["harmful"][2])]),
        interventions=[vauban.Ablate(d)],
        logits=False,
    ).residual[0]
    assert mx.abs(found[2] - alone).max().item() <= 1e-4 * float(mx.abs(alone).max())
    share = mx.abs(found[:, :, 0] @ d) / (mx.linalg.norm(found[:, :, 0], axis=-1))
    assert share.max().item() <= 1e-4


def test_progress_and_bad_input(organism: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    vauban.collect_activations(
        *organism, ["a b", "c", "d e f"], batch_size=2, progress=lambda *x: seen.append(x)
    )
    assert [s[1:] for s in seen] == [(2, 3), (3, 3)]
    with pytest.raises(vauban.InputError, match="empty"):
        vauban.collect_activations(*organism, [])


def test_overflowing_activations_name_the_prompt(tiny: Any, organism: Any) -> None:
    from tests.conftest import build

    model = build("llama")
    model.model.layers[2].mlp.down_proj.weight = 1e38 * mx.ones((64, 96))
    with pytest.raises((vauban.InputError, vauban.ArchitectureError), match="NaN or inf"):
        list(stream_activations(model, _tokenizer(), ["a"]))


def _tokenizer() -> Any:
    class Letters:
        """A template-free tokenizer of one id a character; the encoding path is the real one."""

        chat_template = None
        bos_token_id = None

        def encode(self, text: str, **options: Any) -> list[int]:
            return [ord(c) % 160 for c in text]

    return Letters()


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    offset=st.sampled_from([0.0, 1e3]),
    seed=st.integers(0, 1000),
)
def test_moments_equal_numpy_in_any_split(sizes: list[int], offset: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.normal(offset, 2.0, (n, 3, 2)).astype(np.float32) for n in sizes]
    whole = np.concatenate(parts).astype(np.float64)
    streamed, merged = ActivationMoments(), ActivationMoments()
    for part in parts:
        streamed.update(mx.array(part))
        merged.merge(ActivationMoments().update(mx.array(part)))
    for moments in (streamed, merged):
        assert moments.count == len(whole)
        assert np.allclose(moments.mean, whole.mean(0), rtol=1e-5, atol=1e-4)
        expected = whole.var(0, ddof=1) if len(whole) > 1 else 0 * whole[0]
        assert np.allclose(moments.variance, expected, rtol=2e-2, atol=1e-3)


def test_moments_refuse_other_shapes() -> None:
    moments = ActivationMoments().update(mx.ones((2, 3)))
    with pytest.raises(vauban.InputError, match="after"):
        moments.update(mx.ones((2, 4)))
    with pytest.raises(vauban.InputError, match="no samples"):
        moments.update(mx.ones((0, 3)))
