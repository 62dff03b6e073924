"""Windows longer than any prompt that one would read for a check: the edge is reached all the same.

Every family with a sliding window or chunk, its window made 4096 positions long.
"""

from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.ministral3 import _get_llama_4_attn_scale

import vauban
from tests.architectures import build
from tests.architectures.expected import REFUSED
from vauban.models import families, parity
from vauban.models.caches import stretched
from vauban.models.parity import window_of

WINDOW = 4096


def widened(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tiny model of a configuration with every window of 8 made 4096."""

    def wider(config: dict[str, Any]) -> dict[str, Any]:
        return {
            key: wider(value)
            if isinstance(value, dict)
            else WINDOW
            if value == 8 and ("window" in key or "chunk" in key)
            else value
            for key, value in config.items()
        }

    config = wider(build.configuration(name))
    monkeypatch.setattr(build, "configuration", lambda _: config)
    return build.build(name)


WINDOWED = [
    name
    for name in build.names()
    if name not in REFUSED
    and any(f'"{key}": 8' in str(build.configuration(name)).replace("'", '"')
            for key in ("sliding_window", "attention_chunk_size", "sliding_window_size",
                        "attention_window_size", "loop_window_size"))
]  # fmt: skip


@pytest.mark.parametrize("name", WINDOWED)
def test_the_check_reaches_past_a_long_window(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = widened(name, monkeypatch)
    if window_of(make_prompt_cache(model)) != WINDOW:
        pytest.skip("its window lives in its masks, not in its caches")
    check = vauban.verify_forward(model)
    assert check.tokens > WINDOW
    assert check.ok and check.max_difference <= 1e-5


def _without_window(model: Any, tokens: mx.array, cache: list[Any], visit: Any) -> mx.array:
    """Ministral's loop with one causal mask for all blocks: the mistake that the check is for."""
    trunk = model.model
    h = trunk.embed_tokens(tokens)
    mask = create_attention_mask(h, cache[trunk.fa_idx], return_array=True)
    rope = trunk.args.rope_parameters
    scale = _get_llama_4_attn_scale(
        tokens.shape[1],
        cache[0].offset,
        rope["llama_4_scaling_beta"],
        rope["original_max_position_embeddings"],
    ).astype(h.dtype)
    for i, (layer, state) in enumerate(zip(trunk.layers, cache, strict=True)):
        held = min(state.offset, state.size()) + tokens.shape[1]
        h = layer(visit(h, i), scale, mask[..., -held:], state)
    return trunk.norm(visit(h, len(trunk.layers)))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_loop_that_forgets_a_long_window_is_found(
    dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(families.LOOPS, "ministral3", _without_window)
    model = widened("ministral3", monkeypatch)
    model.update(tree_map(lambda a: a.astype(dtype), model.parameters()))
    check = vauban.verify_forward(model)
    assert check.path == "tap" and "logits differ" in check.note


def test_the_short_prompt_alone_would_not_find_it(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = parity._prompts

    def short(*given: Any) -> Any:
        prompts, *rest = whole(*given)
        return prompts[:1], *rest

    monkeypatch.setattr(parity, "_prompts", short)
    monkeypatch.setitem(families.LOOPS, "ministral3", _without_window)
    assert vauban.verify_forward(widened("ministral3", monkeypatch)).path == "manual"


def test_stretched_caches_hold_the_positions_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = widened("ministral3", monkeypatch)
    cache = make_prompt_cache(model)
    model(mx.arange(20)[None], cache=cache)
    long = stretched(cache, 5000)
    assert [state.offset for state in long] == [5000] * len(cache)
    assert [state.offset for state in cache] == [20] * len(cache)
    full = next(state for state in long if not hasattr(state, "max_size"))
    first = next(state for state in cache if not hasattr(state, "max_size"))
    assert mx.array_equal(full.keys[..., 20:40, :], first.keys[..., :20, :])


def test_a_window_beyond_memory_goes_to_the_tap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that was not seen to cross the window is not trusted, right or wrong."""
    monkeypatch.setattr("vauban.models.parity._LARGEST_CACHE", 1000)
    check = vauban.verify_forward(widened("ministral3", monkeypatch))
    assert check.path == "tap" and check.tokens == 48 and "longer than the check" in check.note
