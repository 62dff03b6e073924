"""Number grids, packing and scales: against what MLX itself decodes and chooses."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vauban.edits.modules import unpack
from vauban.errors import InputError
from vauban.rounding.grid import (
    AFFINE_BITS,
    FLOAT_MODES,
    fresh_grid,
    fresh_is_better,
    grid_of,
    pack,
    scale_values,
)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(AFFINE_BITS),
    rows=st.integers(1, 5),
    words=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_codes_are_packed_as_mlx_reads_them(bits: int, rows: int, words: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, 32 * words)).astype(np.uint8)
    ones, zeros = mx.ones((rows, words)), mx.zeros((rows, words))
    decoded = unpack(mx.array(pack(codes, bits)), ones, zeros, 32, bits, "affine")
    assert (np.array(decoded) == codes).all()


@pytest.mark.parametrize("mode", sorted(FLOAT_MODES))
def test_float_formats_decode_as_mlx_does(mode: str) -> None:
    """Every code that is used, under every scale byte: mlx's own kernel against our formulas."""
    bits, group = FLOAT_MODES[mode]
    grid = grid_of(mode, bits)
    assert (np.diff(grid.values) > 0).all() and len(set(grid.codes.tolist())) == len(grid.values)
    codes = np.resize(grid.codes, -(-len(grid.codes) // group) * group)
    # Scale bytes of ordinary size: mxfp's 2^±40, nvfp4's normal and subnormal positive floats.
    scale_bytes = np.arange(87, 168) if mode != "nvfp4" else np.arange(1, 127)
    rows = mx.array(np.repeat(pack(codes[None], bits), len(scale_bytes), 0))
    scales = mx.array(np.repeat(scale_bytes[:, None], len(codes) // group, 1).astype(np.uint8))
    decoded = mx.dequantize(rows, scales, None, group, bits, mode=mode, dtype=mx.float32)
    expected = scale_values(np.array(scales), mode)[:, :1] * np.resize(grid.values, len(codes))
    assert np.allclose(np.array(decoded), expected, rtol=1e-6)


def test_values_are_rounded_to_the_nearest() -> None:
    x = np.linspace(-700, 700, 4001).astype(np.float32)
    for mode, bits in [("affine", 3), ("mxfp4", 4), ("nvfp4", 4), ("mxfp8", 8)]:
        grid = grid_of(mode, bits)
        chosen = grid.value(grid.round(x))
        nearest = np.abs(x[:, None] - grid.values[None]).min(1)
        assert np.allclose(np.abs(x - chosen), nearest, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_fresh_grids_are_mlx_own(bits: int) -> None:
    full = mx.random.normal((64, 256), key=mx.random.key(bits))
    full[0] = 0.0
    full[1] = mx.abs(full[1])
    _, s, b = mx.quantize(full, group_size=64, bits=bits)
    step, offset = fresh_grid(np.array(full), bits, 64)
    assert np.allclose(step, s, rtol=1e-6) and np.allclose(offset, b, rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_group_gets_the_grid_that_rounds_it_better(bits: int) -> None:
    """Group by group in float64; what lies on its stored grid, or has no steps, keeps its own."""
    random = np.random.default_rng(1)
    target = (0.02 * random.standard_normal((64, 256))).astype(np.float32)
    width = random.uniform(0.8, 1.3, (64, 4)).astype(np.float32)
    step, offset = fresh_grid(target, bits, 64)
    stored, fresh = (width * step, width * offset), (step, offset)
    stored[0][3], stored[1][3] = 0.0, 0.01
    target[3] = 0.01
    target[5] = np.repeat(stored[1][5] + stored[0][5], 64)

    def error(step: np.ndarray, offset: np.ndarray) -> np.ndarray:
        step, offset = step[..., None].astype(np.float64), offset[..., None]
        groups = target.reshape(64, 4, 64)
        codes = np.divide(groups - offset, step, out=np.zeros_like(groups, float), where=step != 0)
        return ((np.clip(np.rint(codes), 0, 2**bits - 1) * step + offset - groups) ** 2).sum(-1)

    better = fresh_is_better(target, stored, fresh, bits)
    gap = error(*fresh) - error(*stored)
    clear = np.abs(gap) > 1e-6 * error(*fresh)
    assert (better == (gap < 0))[clear].all() and 0.2 < better.mean() < 0.95
    assert not better[3].any() and not better[5].any()


def test_what_mlx_does_not_have_is_refused() -> None:
    for mode, bits in (("affine", 7), ("int4", 4)):
        with pytest.raises(InputError, match=r"7 bits|mode 'int4'"):
            grid_of(mode, bits)
    with pytest.raises(InputError, match="do not fill"):
        pack(np.zeros((1, 3), np.uint8), 4)
