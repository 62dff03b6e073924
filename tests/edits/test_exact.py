"""Direction-exact rounding: what is left, at what price, in every packed format."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vauban
from tests.conftest import build
from vauban.edits import pack_edited, quantize_direction_exact
from vauban.edits.modules import unpack
from vauban.edits.update import Update
from vauban.rounding.grid import AFFINE_BITS, FLOAT_MODES


def orthonormal(k: int, size: int, seed: int = 0) -> mx.array:
    rows = np.random.default_rng(seed).normal(size=(size, k))
    return mx.array(np.linalg.qr(rows)[0].T.astype(np.float32))


class Case:
    """A random packed matrix, a direction written `strength` times as strongly, and its cut."""

    def __init__(
        self, out: int, width: int, bits: int, group: int, *, mode: str = "affine", k: int = 1,
        strength: float = 1.0, dtype: mx.Dtype = mx.bfloat16, u: mx.array | None = None,
    ) -> None:  # fmt: skip
        self.format = {"group_size": group, "bits": bits, "mode": mode}
        self.u = orthonormal(k, out) if u is None else u
        full = 0.02 * mx.random.normal((out, width), key=mx.random.key(1))
        full = full + (strength - 1) * (self.u.T @ (self.u @ full))
        stored = mx.quantize(full.astype(dtype), **self.format)
        self.scales, self.biases = stored[1], stored[2] if mode == "affine" else None
        self.before = self.read(stored[0])
        self.removed = self.u @ self.before
        self.target = self.before - self.u.T @ self.removed

    def read(self, packed: mx.array) -> mx.array:
        """Decoded by mlx in float32."""
        biases = None if self.biases is None else self.biases.astype(mx.float32)
        scales = self.scales if self.biases is None else self.scales.astype(mx.float32)
        return mx.dequantize(packed, scales, biases, dtype=mx.float32, **self.format)

    def exact(self, two_sided: bool = True, **options: Any) -> mx.array:
        packed = quantize_direction_exact(
            self.target, self.u, self.scales, self.biases,
            removed=self.removed if two_sided else None, **self.format, **options,
        )  # fmt: skip
        return self.read(packed)

    def naive(self) -> mx.array:
        stored = mx.quantize(self.target.astype(mx.bfloat16), **self.format)
        biases = stored[2].astype(mx.float32) if len(stored) > 2 else None
        scales = stored[1].astype(mx.float32) if len(stored) > 2 else stored[1]
        return mx.dequantize(stored[0], scales, biases, dtype=mx.float32, **self.format)

    def left(self, stored: mx.array) -> float:
        return float(mx.linalg.norm(self.u @ stored) / mx.linalg.norm(self.removed))

    def error(self, stored: mx.array) -> float:
        return float(mx.linalg.norm(stored - self.target) / mx.linalg.norm(self.target))

    def leak(self, stored: mx.array) -> float:
        """What inputs along the removed row now meet instead, in units of what was removed."""
        along = (stored - self.target) @ self.removed.T
        return float(mx.linalg.norm(along) / mx.linalg.norm(self.removed @ self.removed.T))


@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_every_affine_format_loses_the_direction(bits: int, group: int) -> None:
    case = Case(256, 256, bits, group)
    # With 256 rows the finest steps of 2 bits set the floor; it falls with the rows.
    limit = 1e-3 if bits == 2 else 3e-4
    for two_sided in (True, False):
        assert case.left(case.exact(two_sided)) <= limit


@pytest.mark.parametrize("mode", sorted(FLOAT_MODES))
def test_every_float_format_loses_the_direction(mode: str) -> None:
    bits, group = FLOAT_MODES[mode]
    case = Case(256, 128, bits, group, mode=mode)
    assert case.left(case.naive()) > 0.05
    for two_sided in (True, False):
        assert case.left(case.exact(two_sided)) <= 3e-4


def test_what_naive_requantization_leaves_and_what_this_costs() -> None:
    """The figures of the documentation, at the size of a small model's matrix, on a given grid."""
    case = Case(1024, 1024, 4, 64)
    naive, fast, two = case.naive(), case.exact(False), case.exact(True)
    assert case.left(naive) > 0.6
    assert case.left(fast) <= 1e-4 and case.left(two) <= 1e-4
    # One-sided rounding replaces what was removed by something as large; two-sided does not.
    assert case.leak(fast) > 0.8
    assert case.leak(two) <= 0.15
    assert case.error(fast) <= 1.1 * case.error(naive)
    assert case.error(two) <= 1.4 * case.error(naive)


def least_error(case: Case) -> float:
    """No rounding onto the case's grid with u^T Ŵ = 0 has a smaller error: a bound by duality.

    For every c, min_q Σ err² - 2 c (u.err) is at most the least err² of all q with u.err = 0; the
    minimum rounds T + c u code by code. The best c is found by bisection, in float64.
    """
    group, top = case.format["group_size"], 2 ** case.format["bits"] - 1
    steps, offsets = (
        np.repeat(np.array(a.astype(mx.float32), dtype=np.float64), group, axis=1)
        for a in (case.scales, case.biases)
    )
    t, u = np.array(case.target, dtype=np.float64), np.array(case.u[0], dtype=np.float64)[:, None]

    def error(c: np.ndarray) -> np.ndarray:
        codes = np.clip(np.rint((t + u * c - offsets) / steps), 0, top)
        return codes * steps + offsets - t

    low, high = np.full(t.shape[1], -1.0), np.full(t.shape[1], 1.0)
    for _ in range(40):
        middle = (low + high) / 2
        under = (u * error(middle)).sum(0) <= 0
        low, high = np.where(under, middle, low), np.where(under, high, middle)
    e = error(low)
    bound = (e**2).sum() - 2 * (low * (u * e).sum(0)).sum()
    return float(np.sqrt(bound) / np.linalg.norm(t))


@pytest.mark.parametrize(("k", "limit"), [(2, 1e-3), (4, 2e-3)])
def test_several_directions_jointly(k: int, limit: float) -> None:
    case = Case(512, 128, 4, 64, k=k)
    stored = case.exact(True)
    assert case.left(stored) <= limit
    for i in range(k):
        one = mx.linalg.norm(case.u[i] @ stored) / mx.linalg.norm(case.u[i] @ case.before)
        assert float(one) <= 2 * limit


@pytest.mark.parametrize(
    "shape",
    ["massive", "outlier rows", "outlier columns", "zero group", "constant", "one sign", "sparse"],
)
def test_awkward_matrices(shape: str) -> None:
    rng = np.random.default_rng(0)
    full, u = rng.normal(size=(256, 128)) * 0.02, rng.normal(size=256)
    limit = 1e-4
    if shape == "massive":
        u[7], limit = 30.0, 2e-3
    elif shape == "outlier rows":
        full[5] *= 50
    elif shape == "outlier columns":
        full[:, 9] *= 50
        limit = 1e-3
    elif shape == "zero group":
        full[:, :64] = 0.0
    elif shape == "constant":
        full[3] = 0.01
    elif shape == "one sign":
        full = np.abs(full)
    elif shape == "sparse":
        u[80:], limit = 0.0, 2e-3
    u /= np.linalg.norm(u)
    case = Case(256, 128, 4, 64, u=mx.array(u[None].astype(np.float32)))
    stored = mx.quantize(mx.array(full.astype(np.float32)), group_size=64, bits=4)
    case.scales, case.biases = stored[1], stored[2]
    case.before = case.read(stored[0])
    case.removed = case.u @ case.before
    case.target = case.before - case.u.T @ case.removed
    exact = case.exact(True)
    assert case.left(exact) <= limit
    assert np.isfinite(np.array(exact)).all()


@pytest.mark.parametrize("shift", [0.0, 0.18])
def test_codes_that_all_lie_as_far_from_the_grid(shift: float) -> None:
    """No code moves for small shifts of such a column, then very many do at once.

    The two-sided form meets them wherever the cut took next to nothing out of a column.
    """
    rows = 2048
    full = 0.02 * mx.random.normal((rows, 64), key=mx.random.key(0))
    signs = mx.sign(mx.random.normal((rows, 1), key=mx.random.key(1)))
    u = signs.T / rows**0.5
    q, s, b = mx.quantize(full.astype(mx.bfloat16), group_size=64, bits=4)
    s, b = s.astype(mx.float32), b.astype(mx.float32)
    before = mx.dequantize(q, s, b, group_size=64, bits=4)
    target = before + shift * signs * mx.abs(s)
    packed = quantize_direction_exact(target, u, s, b, group_size=64, bits=4)
    left = u @ mx.dequantize(packed, s, b, group_size=64, bits=4)
    # Steps that are all alike have few sums; a rounding that stops short leaves nine tenths.
    assert float(mx.linalg.norm(left) / mx.linalg.norm(u @ before)) <= 1e-3


def test_experts_are_rounded_one_by_one() -> None:
    full = mx.random.normal((3, 128, 64), key=mx.random.key(0))
    q, s, b = mx.quantize(full, group_size=32, bits=4)
    before = mx.dequantize(q, s, b, group_size=32, bits=4)
    u = orthonormal(1, 128)
    removed = u @ before
    target = before - u.T @ removed
    packed = quantize_direction_exact(target, u, s, b, group_size=32, bits=4, removed=removed)
    for e in range(3):
        alone = quantize_direction_exact(
            target[e], u, s[e], b[e], group_size=32, bits=4, removed=removed[e]
        )
        assert mx.array_equal(packed[e], alone)
    left = u @ mx.dequantize(packed, s, b, group_size=32, bits=4)
    assert float(mx.linalg.norm(left) / mx.linalg.norm(removed)) <= 3e-4


def test_embeddings_are_emptied_row_by_row() -> None:
    table = mx.random.normal((90, 256), key=mx.random.key(0))
    q, s, b = mx.quantize(table, group_size=64, bits=4)
    before = mx.dequantize(q, s, b, group_size=64, bits=4)
    u = orthonormal(1, 256)
    target = before - (before @ u.T) @ u
    packed = quantize_direction_exact(target, u, s, b, group_size=64, bits=4, axis="input")
    rows = mx.dequantize(packed, s, b, group_size=64, bits=4) @ u.T
    assert float(mx.abs(rows).max() / mx.abs(before @ u.T).max()) <= 1e-3


@settings(max_examples=20, deadline=None)
@given(
    bits=st.sampled_from([3, 4, 5, 6, 8]),
    group=st.sampled_from([32, 64, 128]),
    rows=st.integers(2, 9),
    groups=st.integers(1, 3),
    k=st.integers(1, 2),
    table=st.booleans(),
)
def test_any_shape(bits: int, group: int, rows: int, groups: int, k: int, table: bool) -> None:
    """Whatever the shape, width, group size: nothing is left, and codes are legal."""
    if table:
        size = 128 * groups
        full = 0.02 * mx.random.normal((rows, size), key=mx.random.key(rows))
        q, s, b = mx.quantize(full, group_size=group, bits=bits)
        u = orthonormal(1, size)
        before = unpack(q, s, b, group, bits, "affine")
        packed = quantize_direction_exact(
            before - (before @ u.T) @ u, u, s, b, group_size=group, bits=bits, axis="input"
        )
        assert packed.shape == q.shape and packed.dtype == q.dtype
        stored = unpack(packed, s, b, group, bits, "affine")
        assert float(mx.linalg.norm(stored @ u.T) / mx.linalg.norm(before @ u.T)) <= 2e-3
        return
    case = Case(64 * rows, group * groups, bits, group, k=k)
    # A Gaussian direction of 128 coordinates has about 43 effective ones: fewer codes to choose.
    limit = 2e-3 * k if rows > 3 else 1e-2
    for two_sided in (True, False):
        assert case.left(case.exact(two_sided)) <= limit


def test_a_module_reports_what_its_rounding_did() -> None:
    model = build("llama")
    nn.quantize(model, group_size=32, bits=4)
    module = model.model.layers[0].mlp.down_proj
    update = Update("down_proj", 0, "mlp", orthonormal(1, 64), 1.0, None, False)
    before = unpack(module.weight, module.scales, module.biases, 32, 4, "affine")
    target = update.weight(before)
    found = pack_edited(module, update)
    stored = unpack(*(found.arrays[n] for n in ("weight", "scales", "biases")), 32, 4, "affine")
    error = float(mx.linalg.norm(stored - target) / mx.linalg.norm(target))
    assert np.isclose(found.error, error, rtol=1e-5)
    assert found.left <= 1e-3 and (found.bits, found.group_size) == (4, 32)
    wide = pack_edited(module, update, bits=8)
    assert wide.bits == 8 and wide.error < found.error / 3 and wide.left <= 1e-4


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("uniform", [False, True])
def test_two_sided_packing_settles_and_stays_near_naive(bits: int, uniform: bool) -> None:
    """Leak at 3 bits as at 4; uniform weights cost more than Gaussian ones."""
    layer = nn.Linear(1024, 1024, bias=False)
    if not uniform:
        layer.weight = 0.02 * mx.random.normal((1024, 1024), key=mx.random.key(1))
    packed = layer.to_quantized(group_size=64, bits=bits)
    update = Update("w", 0, "mlp", orthonormal(1, 1024), 1.0, None, False)
    before = unpack(packed.weight, packed.scales, packed.biases, 64, bits, "affine")
    target = update.weight(before)
    stored = unpack(*mx.quantize(target, group_size=64, bits=bits), 64, bits, "affine")
    naive = float(mx.linalg.norm(stored - target) / mx.linalg.norm(target))
    found = pack_edited(packed, update)
    assert found.left <= 1e-3 and found.leak <= 0.15
    # At 3 bits naive rounding gives back nine tenths of the cut: nearly nothing is changed, at
    # nearly no error.
    bound = {(4, False): 1.35, (4, True): 1.45, (3, False): 1.8, (3, True): 2.1}
    assert found.error <= bound[bits, uniform] * naive


def test_a_grid_that_has_become_too_wide_is_replaced() -> None:
    """A direction that made a row's range: after the cut its old grid is far too coarse."""
    layer = nn.Linear(128, 128, bias=False)
    u = orthonormal(1, 128)
    row = 30.0 * mx.random.normal((1, 128), key=mx.random.key(2))
    layer.weight = mx.random.normal((128, 128), key=mx.random.key(3)) + u.T @ row
    packed = layer.to_quantized(group_size=64, bits=8)
    update = Update("w", 0, "mlp", u, 1.0, None, False)
    found = pack_edited(packed, update)
    assert not mx.array_equal(found.arrays["scales"], packed.scales)
    before = unpack(packed.weight, packed.scales, packed.biases, 64, 8, "affine")
    kept = quantize_direction_exact(
        update.weight(before), u, packed.scales, packed.biases, group_size=64, bits=8
    )
    stored = unpack(kept, packed.scales, packed.biases, 64, 8, "affine")
    target = update.weight(before)
    error = float(mx.linalg.norm(stored - target) / mx.linalg.norm(target))
    assert found.error < error / 1.5 and found.left <= 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 7}, "7 bits"),
        ({"mode": "int4"}, "mode 'int4'"),
        ({"mode": "mxfp4", "bits": 4, "group_size": 64}, "groups of 32"),
        ({"biases": None}, "needs biases"),
        ({"mode": "mxfp4", "bits": 4, "group_size": 32}, "has no biases"),
        ({"group_size": 32}, "do not fit"),
        ({"axis": "rows"}, "axis"),
        ({"directions": mx.ones((1, 3))}, "do not fit"),
        ({"target": mx.full((64, 64), float("nan"))}, "NaN"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    _, s, b = mx.quantize(mx.random.normal((64, 64)), group_size=64, bits=4)
    given_ = {
        "target": mx.zeros((64, 64)), "directions": orthonormal(1, 64), "scales": s, "biases": b,
        "group_size": 64, "bits": 4,
    }  # fmt: skip
    with pytest.raises(vauban.InputError, match=message):
        quantize_direction_exact(**{**given_, **change})
