"""What holds for every intervention: one's own ones, widths, NaN, and the sites they act at."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import vauban
from tests.conftest import build, random_tokens
from vauban.generation import generate_tokens
from vauban.interventions import (
    Ablate,
    AblateTo,
    Add,
    Conditional,
    Erase,
    Flip,
    ModuleOutputs,
    ModuleWeights,
    Patch,
    Project,
)

D = mx.random.normal((64,), key=mx.random.key(3))


class Doubled:
    """An intervention of a user's own: one method is enough."""

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Any:
        return (lambda h: 2 * h) if (site, layer) == ("block_input", 2) else None


class LastToken:
    """One that needs to know where prompts end."""

    def start(self, lengths: Sequence[int]) -> Any:
        ends = mx.array([n - 1 for n in lengths])[:, None, None]

        class Run:
            def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Any:
                def step(h: mx.array) -> mx.array:
                    return mx.where(mx.arange(h.shape[1])[None, :, None] == ends, h + D, h)

                return step if (site, layer, prefill) == ("block_input", 1, True) else None

        return Run()

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Any:
        raise AssertionError("asked before it was started")


def test_ones_own_interventions() -> None:
    assert isinstance(Doubled(), vauban.Intervention)
    model, tokens = build("llama"), random_tokens(2, 7)
    plain = vauban.forward(model, tokens).residual
    doubled = vauban.forward(model, tokens, interventions=[Doubled()]).residual
    assert np.allclose(doubled[:, 2], 2 * plain[:, 2], atol=1e-5)
    lists = [[7, 8, 9, *random_tokens(1, n, seed=n)[0].tolist()] for n in (4, 9)]
    answers = [
        generate_tokens(model, rows, eos=frozenset(), max_tokens=4, interventions=[LastToken()])
        for rows in (lists, lists[:1], lists[1:])
    ]
    assert answers[0] == answers[1] + answers[2]
    padded = mx.array([lists[0] + [0] * 5, lists[1]])
    moved, before = (
        vauban.forward(model, padded, lengths=[7, 12], interventions=i).residual[:, 1, 0]
        for i in ([LastToken()], [])
    )
    assert np.allclose(moved - before, mx.broadcast_to(D, moved.shape), atol=1e-5)


class OwnRow:
    """One that holds something for every row of a batch: row i is moved by its prompt's length."""

    def start(self, lengths: Sequence[int]) -> Any:
        class Run:
            moves = 0.02 * mx.array(lengths).astype(mx.float32)[:, None, None]

            def filter(self, rows: mx.array) -> None:
                self.moves = self.moves[rows]

            def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Any:
                here = (site, layer) == ("block_input", 1)
                return (lambda h: h + self.moves * D) if here else None

        return Run()

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Any:
        raise AssertionError("asked before it was started")


@pytest.mark.parametrize("conditional", [False, True])
def test_rows_that_finish_leave_their_state_too(conditional: bool) -> None:
    """Also of a state inside a condition: the rows that stay keep what is theirs."""
    model = build("llama")
    lists = [[7, 8, 9, *random_tokens(1, n, seed=n)[0].tolist()] for n in (2, 5, 9)]
    change: Any = Conditional(D, -1.0, OwnRow(), layer=1) if conditional else OwnRow()

    def answers(rows: list[list[int]], eos: frozenset[int]) -> list[list[int]]:
        return generate_tokens(model, rows, eos=eos, max_tokens=8, interventions=[change])

    # The token of one answer ends that one at once and leaves the others.
    first = answers(lists[:1], frozenset())[0]
    eos = frozenset([first[0]])
    alone = [answers([row], eos)[0] for row in lists]
    assert len({len(a) for a in alone}) > 1
    assert answers(lists, eos) == alone


def eraser(d: int) -> Any:
    return vauban.fit_leace(mx.random.normal((9, d)), mx.arange(9) % 2)


@pytest.mark.parametrize("wrong", [1, 32, 65])
@pytest.mark.parametrize(
    "make",
    [
        lambda v: Ablate(v),
        lambda v: Project(v),
        lambda v: Flip(v),
        lambda v: Add(v, 1.0, 2),
        lambda v: Patch(v, 2, 0),
        lambda v: AblateTo(v, 0.0),
        lambda v: Conditional(v, 0.0, Ablate(v), layer=1),
        lambda v: ModuleOutputs({"model.layers.1.mlp.down_proj": (v[None], 1.0)}),
        lambda v: ModuleOutputs({}, {"model.embed_tokens": (v[None], 1.0)}),
        lambda v: Erase(eraser(max(v.size, 2)), 1),
    ],
)
def test_another_width_than_the_models_is_named(make: Any, wrong: int) -> None:
    """A vector of one component would be added to all of them."""
    change, model = make(mx.ones(wrong)), build("llama")
    with pytest.raises(vauban.InputError, match="components; the residual stream has 64"):
        vauban.forward(model, random_tokens(1, 4), interventions=[change])
    with pytest.raises(vauban.InputError, match="components; the residual stream has 64"):
        generate_tokens(model, [[1, 2]], eos=frozenset(), max_tokens=2, interventions=[change])


def test_widths_that_differ_within_a_value_are_named() -> None:
    with pytest.raises(vauban.InputError, match="Ablate: direction has 32"):
        Conditional(D, 0.0, Ablate(mx.ones(32)), layer=1)
    with pytest.raises(vauban.InputError, match="different width"):
        Erase({0: eraser(8), 1: eraser(9)})
    path = "model.layers.1.mlp.down_proj"
    for shape in ((64, 1), (1, 96), (96,)):
        with pytest.raises(vauban.InputError, match=r"shape .* expected \(64, 96\)"):
            vauban.forward(
                build("llama"), random_tokens(1, 4),
                interventions=[ModuleWeights({path: mx.ones(shape)}, {})],
            )  # fmt: skip
    with pytest.raises(vauban.InputError, match="cannot be switched row by row"):
        Conditional(D, 0.0, ModuleWeights({path: mx.ones((64, 96))}, {}), layer=1)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "make",
    [
        lambda x: Ablate(D, alpha=x),
        lambda x: Project(D, x),
        lambda x: Flip(D, alpha=x),
        lambda x: Flip(D, midpoint=x * D),
        lambda x: Add(D, x, 2),
        lambda x: Add(x * D, 1.0, 2),
        lambda x: AblateTo(D, x),
        lambda x: AblateTo(D, {1: x}, layers=1),
        lambda x: Conditional(D, x, Ablate(D), layer=1),
    ],
)
def test_nan_and_inf_are_refused_where_they_are_given(make: Any) -> None:
    for value in (NAN, INF, -INF):
        with pytest.raises(vauban.InputError, match=r"finite number|NaN or inf"):
            make(value)


@pytest.mark.parametrize("make", [lambda x: Project(D, x), lambda x: AblateTo(D, x)])
def test_words_are_no_numbers(make: Any) -> None:
    with pytest.raises(vauban.InputError, match="expected a number"):
        make("strong")


class Broken:
    """Puts NaN into a stream, as an overflow in half precision does."""

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Any:
        return (lambda h: h * NAN) if (site, layer) == ("block_input", 1) else None


@pytest.mark.parametrize("above", [True, False])
def test_a_condition_on_a_broken_stream_is_no_unmet_condition(above: bool) -> None:
    change = Conditional(D, 0.5, Ablate(D), layer=2, above=above)
    with pytest.raises(vauban.errors.ModelError, match="cannot be decided"):
        vauban.forward(build("llama"), random_tokens(1, 4), interventions=[Broken(), change])


def test_values_read_results_that_hold_a_direction(organism: Any) -> None:
    X = mx.random.normal((30, 64), key=mx.random.key(8)) + (mx.arange(30) % 2)[:, None] * D
    fitted = vauban.fit_mean_difference(X, mx.arange(30) % 2)
    h = mx.random.normal((2, 3, 64), key=mx.random.key(1))
    for value, plain in (
        (Ablate(fitted), Ablate(fitted.vector)),
        (Project(fitted, 2.0), Project(fitted.vector, 2.0)),
        (Flip(fitted), Flip(fitted.vector)),
        (Add(fitted, 2.0, 0), Add(fitted.vector, 2.0, 0)),
        (Add(np.array(fitted.vector), 2.0, 0), Add(fitted.vector, 2.0, 0)),
        (AblateTo(fitted, 1.0), AblateTo(fitted.vector, 1.0)),
    ):
        a, b = (v.change("block_input", 0, 4, True)(h) for v in (value, plain))
        assert mx.array_equal(a, b)
    # `Add` keeps the length of what it is given, the others do not care.
    moved = Add(fitted, 2.0, 0).change("block_input", 0, 4, True)(h) - h
    assert np.allclose(moved, mx.broadcast_to(2 * fitted.vector, moved.shape), atol=1e-5)


def test_layers_and_positions_are_read_from_any_kind_of_integers() -> None:
    for two in ([1, 2], (2, 1), range(1, 3), np.array([1, 2]), mx.array([1, 2]), {1, 2}):
        assert Ablate(D, layers=two).layers.chosen == {1, 2}
        assert sorted(Patch(D, 2, two).positions) == [1, 2]
    for one in (3, np.int64(3), mx.array(3)):
        assert Project(D, layers=one).layers.chosen == {3}
        assert Add(D, 1.0, one).layer == 3 and Patch(D, one, one).positions == (3,)
    for wrong in (1.5, [0.5], "first", None, [[1]], mx.array([0.5])):
        with pytest.raises(vauban.InputError, match="expected 'all'"):
            Ablate(D, layers=wrong)


def test_a_value_can_be_replaced_in_part() -> None:
    half = replace(Ablate(D, [1], "mlp_output"), alpha=0.5)
    assert half.alpha == 0.5 and half.layers.chosen == {1} and half.sites == {"mlp_output"}
    assert replace(Patch(D, 2, [0, -1]), layer=3).positions == (0, -1)


def test_ablation_at_half_strength_halves_a_term() -> None:
    h, unit = mx.random.normal((2, 3, 64)), D / mx.linalg.norm(D)
    done = Ablate(D, alpha=0.5).change("mlp_output", 0, 4, True)(h)
    assert np.allclose(done @ unit, 0.5 * (h @ unit), atol=1e-5)


def test_the_sites_are_named_at_the_top() -> None:
    assert vauban.SITES == ("block_input", "attention_output", "mlp_output")
    assert vauban.Patch is Patch
