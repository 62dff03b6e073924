"""Directions, widths and packings at the edge of what can be rounded exactly."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import vauban
from tests.architectures.build import build
from vauban.edits import Update, pack_edited, store_packed
from vauban.edits.modules import unpack
from vauban.errors import InputError


def module(rows: int, columns: int, **form: Any) -> nn.Module:
    linear = nn.Linear(columns, rows, bias=False)
    linear.weight = 0.02 * mx.random.normal((rows, columns), key=mx.random.key(0))
    return linear.to_quantized(**form) if form else linear


def update(u: np.ndarray) -> Update:
    basis = np.linalg.qr(np.atleast_2d(u).T)[0].T.astype(np.float32)
    return Update("weight", 0, "mlp", mx.array(basis), 1.0, None, False)


def naive_error(packed: nn.Module, cut: Update) -> float:
    before = unpack(packed.weight, packed.scales, packed.biases, 64, 4, "affine")
    target = cut.weight(before)
    read = unpack(*mx.quantize(target, 64, 4), 64, 4, "affine")
    return float(mx.linalg.norm(read - target) / mx.linalg.norm(target))


def heavy_tails(kind: str) -> np.ndarray:
    random = np.random.RandomState(1)
    if kind == "laplace":
        return random.laplace(size=512)
    if kind == "student":
        return random.standard_t(3, 512)
    u = random.randn(512)
    u[7 : 7 + int(kind)] = 8.0
    return u


@pytest.mark.parametrize("kind", ["laplace", "student", "1", "12"])
def test_heavy_rows_are_no_substitute_for_the_direction(kind: str) -> None:
    """Rows that are frozen while the rest is fitted are rounded with the shift that is to come."""
    packed, cut = module(512, 512, group_size=64, bits=4), update(heavy_tails(kind))
    found = pack_edited(packed, cut)
    assert found.left <= 1e-3 and found.leak <= 0.15
    assert found.error <= 1.35 * naive_error(packed, cut)


@pytest.mark.parametrize("rows", [64, 128, 256])
def test_equal_coordinates_are_rounded_away(rows: int) -> None:
    """Steps of equal size leave no fine sums but their differences."""
    random = np.random.RandomState(0)
    u = np.zeros(512)
    u[random.permutation(512)[:rows]] = random.choice([-1.0, 1.0], rows)
    stored = store_packed(module(512, 512, group_size=64, bits=4), update(u), None)
    assert stored is not None and stored.bits == 4 and stored.left <= 1e-3


def test_several_directions_keep_four_bits() -> None:
    u = np.random.RandomState(0).randn(4, 512)
    stored = store_packed(module(512, 512, group_size=64, bits=4), update(u), None)
    assert stored is not None and stored.bits == 4 and stored.left <= 1e-3


def test_a_direction_outside_the_matrix_moves_no_code() -> None:
    packed = module(64, 64, group_size=64, bits=4)
    cut = Update("weight", 0, "mlp", mx.zeros((1, 64)), 1.0, None, False)
    assert mx.array_equal(pack_edited(packed, cut).arrays["weight"], packed.weight)


def test_eight_bits_take_a_group_that_divides_the_width() -> None:
    u = np.random.RandomState(0).randn(128)
    assert store_packed(module(128, 96), update(u), "8bit").group_size == 32
    assert store_packed(module(128, 72), update(u), "8bit") is None
    narrow = module(128, 160, group_size=16, bits=4, mode="nvfp4")
    few = np.zeros(128)
    few[:3] = (1.0, -2.0, 0.5)
    stored = store_packed(narrow, update(few), None)
    assert stored is None or (stored.bits, stored.group_size) == (8, 32)
    with pytest.raises(InputError, match="72 columns; packing takes a multiple of 32"):
        pack_edited(module(128, 72), update(u), bits=8)


def test_packings_that_vauban_does_not_read_are_refused_before_anything() -> None:
    model = build("prism_hadamard_qwen35")
    plan = vauban.plan_cut(model, mx.random.normal((128,)), embedding=False)
    with pytest.raises(InputError, match="does not rewrite"):
        plan.apply(model)


def test_matrices_before_the_blocks_are_cut_as_matrices() -> None:
    """n-gram projections write their outputs, although no block comes before them."""
    model = build("longcat_flash_ngram")
    plan = vauban.plan_cut(model, mx.random.normal((64,), key=mx.random.key(2)))
    before = {u.path for u in plan.updates if u.layer < 0 and not u.writes_rows}
    assert before
    leakage = plan.leakage()
    assert all(leakage.writers[path] < 1e-5 for path in before)
    tokens = mx.array([[3, 5, 7, 11, 13, 17]])
    at_run_time = vauban.forward(model, tokens, interventions=plan.virtual()).logits
    edited = vauban.forward(plan.apply(model), tokens).logits
    assert float(mx.abs(edited - at_run_time).max()) < 1e-4 * float(mx.abs(at_run_time).max())
