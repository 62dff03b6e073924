"""What is kept on a model: one attribute, never stale after an edit, nothing left of a swap."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache

import vauban
from tests.conftest import random_tokens
from vauban.models import anatomy, can_pad, describe, folder_of, forget
from vauban.models.notes import notes, set_aside
from vauban.models.swap import around, swapped


def size(model: nn.Module) -> int:
    return sum(p.nbytes for _, p in vauban._arrays.flat_parameters(model).items())


def test_an_edited_model_is_described_as_it_is_now() -> None:
    path = vauban.organism_path("4bit")
    model, _ = vauban.load(path)
    before = describe(model)
    assert before.bytes == size(model) and before.path == str(path)
    vauban.plan_cut(model, mx.ones(before.d_model)).apply(model, "float", calibrate=False)
    after = describe(model)
    assert after.bytes == size(model) > before.bytes
    assert after.path == before.path and after.stored_dtype == before.stored_dtype
    assert folder_of(model) == path


def test_everything_known_stands_under_one_attribute(tiny: Any) -> None:
    model = tiny("llama")
    plain = set(vars(model))
    tokens = random_tokens(2, 5)
    vauban.forward(model, tokens, lengths=[5, 3])
    assert len(set(vars(model)) - plain) == 1
    assert notes(model).check is not None and can_pad(model)
    forget(model)
    assert notes(model).anatomy is None and notes(model).check is None
    assert notes(model).rows is None


def test_notes_are_set_aside_and_come_back(tiny: Any) -> None:
    model = tiny("llama")
    parts = anatomy(model)
    with pytest.raises(ValueError, match="stop"), set_aside(model):
        assert notes(model).anatomy is None
        assert anatomy(model) is not parts
        raise ValueError("stop")
    assert anatomy(model) is parts


def test_swaps_nest_and_leave_no_trace_after_an_error(tiny: Any) -> None:
    model = tiny("llama")
    norm, cls = model.model.norm, type(model.model.norm)
    tokens = random_tokens(1, 4)
    before = model(tokens, cache=make_prompt_cache(model))

    def twice(call: Any, x: mx.array) -> mx.array:
        return 2.0 * call(x)

    with pytest.raises(RuntimeError), swapped([around(norm, twice)]):
        with swapped([around(norm, twice)]):
            assert isinstance(norm, cls)
            got = model(tokens, cache=make_prompt_cache(model))
        assert mx.allclose(got, 4.0 * before, rtol=1e-5)
        raise RuntimeError
    assert type(norm) is cls
    with (
        pytest.raises(vauban.ArchitectureError, match="at two places"),
        swapped([around(norm, twice), around(norm, twice)]),
    ):
        pass
    assert type(norm) is cls
