"""Interventions as pure values: algebra, scopes and bad input. No model is involved."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from vauban.errors import InputError
from vauban.interventions import SITES, Ablate, Add, ModuleOutputs, Project


def h(seed: int = 0) -> mx.array:
    return mx.random.normal((2, 3, 8), key=mx.random.key(seed))


D = mx.random.normal((8,), key=mx.random.key(7))


def at(value: Any, site: str = "block_input", layer: int = 0, prefill: bool = True) -> Any:
    return value.change(site, layer, 4, prefill)


def test_ablation_empties_the_span_and_is_idempotent() -> None:
    rows = mx.stack([D, D + h()[0, 0]])
    step = at(Ablate(rows))
    once = step(h())
    assert mx.abs(once @ rows.T).max().item() <= 1e-5
    assert np.allclose(step(once), once, atol=1e-6)


def test_projection_scales_the_span_by_one_minus_alpha() -> None:
    unit = D / mx.linalg.norm(D)
    for alpha in (0.0, 0.5, 1.0, 2.0):
        done = at(Project(D, alpha))(h())
        assert np.allclose(done @ unit, (1 - alpha) * (h() @ unit), atol=1e-5)
        rest = h() - (h() @ unit)[..., None] * unit
        assert np.allclose(done - (done @ unit)[..., None] * unit, rest, atol=1e-5)
    assert np.allclose(at(Project(D, 1.0))(h()), at(Ablate(D))(h()), atol=1e-6)
    twice = at(Project(D, 2.0))
    assert np.allclose(twice(twice(h())), h(), atol=1e-5)


def test_projection_touches_a_stream_once() -> None:
    """A reflection at every block input would cancel itself: only the first input is changed."""
    every = Project(D, 2.0)
    assert [at(every, layer=i) is not None for i in range(5)] == [True, False, False, False, False]
    assert all(at(every, site, i) for site in SITES[1:] for i in range(4))
    some = Project(D, 2.0, layers=[2, 3, 3])
    assert [at(some, layer=i) is not None for i in range(4)] == [False, False, True, False]
    assert [at(some, "mlp_output", i) is not None for i in range(4)] == [False, False, True, True]


def test_ablation_scopes() -> None:
    value = Ablate(D, layers=1, sites="mlp_output")
    found = {(s, i) for s in SITES for i in range(5) if at(value, s, i)}
    assert found == {("mlp_output", 1)}
    assert {(s, i) for s in SITES for i in range(5) if at(Ablate(D), s, i)} == {
        (s, i) for s in SITES for i in range(4)
    }


def test_addition() -> None:
    value = Add(D, 0.5, 2, "prompt")
    assert np.allclose(at(value, layer=2)(h()), h() + 0.5 * D, atol=1e-6)
    assert at(value, layer=2, prefill=False) is None
    assert at(Add(D, 0.5, 2), layer=2, prefill=False) is not None
    assert at(value, layer=1) is None and at(value, "mlp_output", 2) is None
    assert at(Add(D, 1.0, 4), layer=4) is not None


def test_dtypes_are_kept() -> None:
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        x = h().astype(dtype)
        assert at(Ablate(D))(x).dtype == dtype
        assert at(Add(D, 1.0, 0))(x).dtype == dtype
        assert ModuleOutputs({"a": (D[None], 1.0)}).output_change("a")(x).dtype == dtype
    assert ModuleOutputs({"a": (D[None], 1.0)}).output_change("b") is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ablate(mx.zeros(8)), "is zero"),
        (lambda: Ablate(mx.full((8,), float("inf"))), "NaN or inf"),
        (lambda: Ablate(mx.stack([D, 2 * D])), "linearly dependent"),
        (lambda: Ablate(mx.ones((3, 2))), "expected"),
        (lambda: Ablate(D, sites=["output"]), "sites"),
        (lambda: Ablate(D, layers=[]), "layers is empty"),
        (lambda: Ablate(D, layers=[-1]), "negative"),
        (lambda: Ablate(D, layers="some"), "layers is 'some'"),
        (lambda: at(Ablate(D, layers=4)), "blocks 0 to 3"),
        (lambda: at(Add(D, 1.0, 5)), "residuals 0 to 4"),
        (lambda: Add(D, 1.0, -1), "negative"),
        (lambda: Add(h()[0, :2], 1.0, 0), r"expected one, \(d,\)"),
        (lambda: Add(D, 1.0, 0, "answer"), "positions"),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
