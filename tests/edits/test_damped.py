"""Calibrated rounding stays near the error of requantizing naively, whatever was read."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from vauban.edits import Update, damped, pack_edited
from vauban.edits.modules import module_weight, unpack
from vauban.edits.moments import Energy, InputMoments


def packed(kind: str, bits: int = 4) -> nn.Module:
    mx.random.seed(0)
    plain = nn.Embedding(300, 256) if kind == "embedding" else nn.Linear(256, 256, bias=False)
    plain.weight = 0.02 * mx.random.normal(plain.weight.shape)
    return plain.to_quantized(group_size=64, bits=bits)


def steep(strength: float) -> Energy:
    """Inputs along few directions: the further they stand out, the dearer rounding for them."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(600, 256)) * np.arange(1, 257) ** -strength
    turn = np.linalg.qr(random.normal(size=(256, 256)))[0]
    return InputMoments(256, 256).update(rows @ turn).energy()


def cut(kind: str) -> Update:
    u = mx.random.normal((1, 256), key=mx.random.key(1))
    layer = -1 if kind == "embedding" else 0
    return Update("weight", layer, kind, u / mx.linalg.norm(u), 1.0, None, False)


def shares(module: nn.Module, update: Update, energy: Energy) -> tuple[float, float, float]:
    """Of the calibrated matrix, against naive requantization and against the data-free one."""
    target = np.array(update.weight(module_weight(module)))

    def off(packing: tuple[mx.array, mx.array, mx.array]) -> np.ndarray:
        return np.array(unpack(*packing, 64, module.bits, "affine")) - target

    arrays = [pack_edited(module, update, read).arrays for read in ((energy,), ())]
    ours, free = (off((a["weight"], a["scales"], a["biases"])) for a in arrays)
    naive = off(mx.quantize(mx.array(target), 64, module.bits))
    seen = [float(((e @ energy.factor.T) ** 2).sum()) for e in (ours, free)]
    size = [float(np.linalg.norm(e)) for e in (ours, free, naive)]
    return size[0] / size[2], size[1] / size[2], seen[0] / seen[1]


@pytest.mark.parametrize("kind", ["mlp", "embedding"])
@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_the_plain_error_is_bounded_and_what_is_read_comes_out_better(
    kind: str, strength: float
) -> None:
    dear, free, seen = shares(packed(kind), cut(kind), steep(strength))
    assert dear <= max(damped.MOST, free) + 1e-3
    assert seen < 0.9


def test_where_no_damping_is_enough_inputs_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    module, update = packed("mlp"), cut("mlp")
    monkeypatch.setattr(damped, "MOST", 0.5)
    read = pack_edited(module, update, (steep(1.0),)).arrays
    free = pack_edited(module, update).arrays
    assert all(mx.array_equal(read[name], free[name]) for name in free)


def test_eight_codes_are_not_held_to_naive_error() -> None:
    """Two-sided rounding itself is dearer there: naive gives back most of the cut."""
    dear, free, seen = shares(packed("mlp", bits=3), cut("mlp"), steep(1.0))
    assert dear > damped.MOST and free > 1.2 and seen < 0.8
