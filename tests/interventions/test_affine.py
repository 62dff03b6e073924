"""Flip, erase, ablate to a value: algebra, scopes and bad input. No model is involved."""

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from vauban.directions import Direction, fit_leace
from vauban.errors import InputError
from vauban.interventions import SITES, AblateTo, Add, Erase, Flip, Project

D = mx.random.normal((8,), key=mx.random.key(7))
UNIT = D / mx.linalg.norm(D)


def h(seed: int = 0) -> mx.array:
    return mx.random.normal((2, 3, 8), key=mx.random.key(seed))


def at(value: Any, site: str = "block_input", layer: int = 0, prefill: bool = True) -> Any:
    return value.change(site, layer, 4, prefill)


def touched(value: Any) -> set[tuple[str, int]]:
    places = [(site, i) for site in SITES for i in range(4)] + [("block_input", 4)]
    return {(site, i) for site, i in places if at(value, site, i) is not None}


def test_linear_flip_is_the_projection_with_alpha_two() -> None:
    for layers in ("all", [1, 3]):
        flip, project = Flip(D, layers=layers), Project(D, 2.0, layers)
        assert touched(flip) == touched(project)
        for site, layer in touched(flip):
            assert np.allclose(at(flip, site, layer)(h()), at(project, site, layer)(h()), atol=1e-6)


def test_affine_flip_swaps_the_class_means_along_the_direction() -> None:
    high, low = h(1)[0, 0], h(2)[0, 0]
    flip = at(Flip(D, (high + low) / 2, layers=2), layer=2)
    assert np.allclose(flip(high) @ UNIT, low @ UNIT, atol=1e-5)
    assert np.allclose(flip(low) @ UNIT, high @ UNIT, atol=1e-5)
    # Across the direction nothing moves.
    across = high - (high @ UNIT) * UNIT
    assert np.allclose(flip(high) - (flip(high) @ UNIT) * UNIT, across, atol=1e-5)
    # The linear flip misses: it mirrors about zero.
    linear = at(Flip(D, layers=2), layer=2)
    assert np.allclose(linear(high) @ UNIT, -(high @ UNIT), atol=1e-5)


def test_a_block_named_twice_is_flipped_once() -> None:
    once, twice = Flip(D, layers=[2]), Flip(D, layers=[2, 2])
    assert touched(once) == touched(twice) == {(s, 2) for s in SITES}
    step = at(twice, layer=2)
    assert np.allclose(step(h()), at(once, layer=2)(h()))
    # Had it been applied twice, it would have been nothing at all.
    assert np.allclose(step(step(h())), h(), atol=1e-5)


def test_moving_midpoints_add_up() -> None:
    """A stream flipped about m_0 and shifted by 2 D'D(m_2 - m_0) is flipped about m_2."""
    points = {0: h(1)[0, 0], 2: h(2)[0, 0]}
    moving = Flip(D, points)
    stream = at(moving, layer=2)(at(moving, layer=0)(h()))
    assert np.allclose(stream, at(Flip(D, points[2], layers=0), layer=0)(h()), atol=1e-5)
    assert touched(moving) == {("block_input", 0), ("block_input", 2)} | {
        (s, i) for s in SITES[1:] for i in range(4)
    }
    # A midpoint outside the scope does not move the stream.
    assert at(Flip(D, points, layers=[0, 1]), layer=2) is None


def test_ablation_to_a_value() -> None:
    values = {1: -3.0, 2: 0.5}
    to = AblateTo(D, values, layers=[1, 2])
    assert touched(to) == {("block_input", 1), ("block_input", 2)}
    for layer, value in values.items():
        step = at(to, layer=layer)
        done = step(h())
        assert np.allclose(done @ UNIT, value, atol=1e-5)
        assert np.allclose(done - value * UNIT, h() - (h() @ UNIT)[..., None] * UNIT, atol=1e-5)
        assert np.allclose(step(done), done, atol=1e-5)
    assert len(touched(AblateTo(D, 1.0))) == 5
    listed = AblateTo(D, mx.arange(5).astype(mx.float32))
    assert np.allclose(at(listed, layer=4)(h()) @ UNIT, 4.0, atol=1e-5)
    with pytest.raises(InputError, match="no value for residual 0"):
        at(AblateTo(D, values))


def result() -> Any:
    """What AblateTo and Add read of a DirectionResult: three blocks, d = 8."""
    return SimpleNamespace(
        direction=UNIT, norms=mx.array([2.0, 3.0, 4.0]), layer_index=1, residual_index=2,
        means=mx.stack([h(3)[0], h(4)[0]]),
    )  # fmt: skip


def test_values_from_a_result_are_the_harmless_means() -> None:
    to = AblateTo.from_result(result())
    assert touched(to) == {("block_input", i) for i in (1, 2, 3)}
    assert np.allclose(at(to, layer=3)(h()) @ UNIT, result().means[0, 2] @ UNIT, atol=1e-5)


def test_addition_along_a_classifier_has_the_length_of_the_difference() -> None:
    classifier = Direction(0.01 * D, 0.0, "logistic")
    step = at(Add.from_classifier(classifier, result(), 0.5), layer=2)(h()) - h()
    assert np.allclose(step, mx.broadcast_to(0.5 * 3.0 * UNIT, step.shape), atol=1e-5)
    with pytest.raises(InputError, match="9 components; the residual stream has 8"):
        Add.from_classifier(mx.ones(9), result(), 1.0)


def test_erasing_applies_the_eraser_of_each_residual() -> None:
    y = mx.arange(40) % 2
    X = [mx.random.normal((40, 8), key=mx.random.key(i)) + y[:, None] * D for i in (0, 1)]
    first, second = (fit_leace(x, y) for x in X)
    value = Erase({1: first, 3: second})
    assert touched(value) == {("block_input", 1), ("block_input", 3)}
    assert np.allclose(at(value, layer=1)(X[0]), first(X[0]), atol=1e-6)
    assert np.allclose(at(value, layer=3)(X[0]), second(X[0]), atol=1e-6)
    assert len(touched(Erase(first, "all"))) == 5
    assert touched(Erase({1: first, 3: second}, layers=3)) == {("block_input", 3)}


def test_dtypes_are_kept() -> None:
    eraser = fit_leace(mx.random.normal((9, 8)), mx.arange(9) % 2)
    for dtype in (mx.float16, mx.bfloat16):
        x = h().astype(dtype)
        for value in (Flip(D, D), AblateTo(D, 1.0), Erase(eraser, "all")):
            assert at(value)(x).dtype == dtype


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Flip(D, {1: D}), "block of the scope, 0"),
        (lambda: Flip(D, mx.ones(5)), "midpoint: direction has 5 components"),
        (lambda: Flip(mx.zeros(8)), "is zero"),
        (lambda: at(Flip(D, layers=4)), "blocks 0 to 3"),
        (lambda: AblateTo(h()[0, :2], 1.0), r"expected one, \(d,\)"),
        (lambda: AblateTo(D, {1: 2.0}, layers=[2]), "no value for residual 2"),
        (lambda: at(AblateTo(D, 1.0, layers=5)), "residuals 0 to 4"),
        (lambda: Erase(D, "all"), "has no left"),
        (lambda: Erase({}), "no eraser"),
        (lambda: Erase(fit_leace(h()[0], mx.array([0, 1, 1]))), "name the residuals"),
        (lambda: Erase({1: fit_leace(h()[0], mx.array([0, 1, 1]))}, layers=[2]), "asks for others"),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
