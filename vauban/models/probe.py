"""Which matrices write to the residual stream, found by running the model, not by their names.

Every leaf of a block whose output is as wide as the stream is made to put out a constant instead;
it is a writer iff the block's output still depends on that constant. A balanced plus/minus one
constant also tells the gain between writer and stream. Knows modules; computes no edit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from vauban.models.anatomy import Anatomy, anatomy, is_embedding
from vauban.models.paths import by_hand, by_tap
from vauban.models.swap import around, swapped
from vauban.models.verify import verify_forward
from vauban.models.writers import Writer, residual_writers, unpacked_shape

_TOKENS = 6
# What does not depend on the constant is computed from the same numbers and stays bit for bit.
_FLOOR = 1e-7


@dataclass(frozen=True, eq=False)
class Probed:
    """One writer that the probe found: its path, its block, and the measured gain (out,).

    The gain is scaled to a root mean square of one; all ones where nothing stands between the
    writer and the stream, whatever scalar multiplies it.
    """

    path: str
    layer: int
    gain: mx.array


@dataclass(frozen=True)
class ProbeReport:
    """How the rule over names compares with the probe; both differences are empty when they agree.

    `gains` is the largest |cosine - 1| between a writer's gain and the measured one.
    """

    missed: tuple[str, ...]
    invented: tuple[str, ...]
    gains: float

    @property
    def ok(self) -> bool:
        return not self.missed and not self.invented and self.gains < 1e-3


class _Constants:
    """What the leaves put out: `value` at `path`, zeros at every other; `ran` collects calls."""

    def __init__(self) -> None:
        self.path = ""
        self.value: mx.array | float = 0.0
        self.ran: set[str] = set()


def _candidates(model: nn.Module, parts: Anatomy) -> dict[str, nn.Module]:
    """Leaves with a matrix whose output is as wide as the stream, in blocks, by path."""
    found = {}
    for layer, path in zip(parts.layers, parts.layer_paths, strict=True):
        for inside, module in layer.named_modules():
            weight = module.get("weight")
            if not isinstance(weight, mx.array) or weight.ndim < 2 or module.children():
                continue
            if is_embedding(module) or "conv" in type(module).__name__.lower():
                continue
            if unpacked_shape(module)[-2] == parts.d_model:
                found[f"{path}.{inside}"] = module
    return found


def _constant(leaves: dict[str, nn.Module], constants: _Constants) -> AbstractContextManager[None]:
    """Let the leaves run (their shape is needed) and put out their constant instead."""

    def call(path: str, inner: Any, *args: Any, **kwargs: Any) -> mx.array:
        out = inner(*args, **kwargs)
        constants.ran.add(path)
        if path != constants.path:
            return mx.zeros_like(out)
        return mx.broadcast_to(mx.array(constants.value).astype(out.dtype), out.shape)

    return swapped(around(module, partial(call, path)) for path, module in leaves.items())


def silenced(model: nn.Module) -> AbstractContextManager[None]:
    """Inside the block every matrix that could write to the stream puts out zeros."""
    return _constant(_candidates(model, anatomy(model)), _Constants())


def probe_writers(model: nn.Module) -> list[Probed]:
    """All residual writers inside the blocks, with their measured gains, block by block.

    Runs the model twice per candidate up to the block it stands in, on a few tokens. An expert of
    a list that no token was routed to is taken for what its neighbours are.
    """
    check = verify_forward(model)
    parts = anatomy(model)
    leaves = _candidates(model, parts)
    constants = _Constants()
    run = by_hand if check.path == "manual" else by_tap
    tokens = (mx.arange(_TOKENS)[None] * 7919 + 13) % min(parts.vocabulary, 50_000)
    signs = mx.where(mx.arange(parts.d_model) % 2 == 0, 1.0, -1.0)
    # A fixed shuffle, so that no structure of the columns goes with the signs.
    signs = signs[mx.argsort(mx.random.uniform(shape=signs.shape, key=mx.random.key(0)))]

    def output(layer: int, path: str, value: mx.array | float) -> mx.array:
        constants.path, constants.value = path, value
        _, stream = run(
            model, parts, tokens, make_prompt_cache(model), (), True, False, mx.array([_TOKENS - 1])
        )
        return stream[layer + 1].astype(mx.float32)

    found: list[Probed] = []
    silent: list[str] = []
    with _constant(leaves, constants):
        for path in leaves:
            layer = _layer_of(path, parts)
            still = output(layer, "", 0.0)
            size = mx.sqrt(mx.mean(mx.square(still))) + 1e-3
            constants.ran.clear()
            moved = output(layer, path, signs * size) - output(layer, path, -signs * size)
            vectors = (moved * signs).reshape(-1, parts.d_model)
            norms = mx.linalg.norm(vectors, axis=-1)
            if float(norms.max()) <= _FLOOR * float(size):
                silent += [] if path in constants.ran else [path]
                continue
            gain = vectors[mx.argmax(norms)]
            # A scalar may flip every sign (a learned correction between streams).
            gain = gain / mx.sqrt(mx.mean(mx.square(gain))) * mx.sign(gain.sum())
            found.append(Probed(path, layer, gain))
    found += _silent(found, silent, parts)
    return sorted(found, key=lambda probed: probed.layer)


def _layer_of(path: str, parts: Anatomy) -> int:
    return next(i for i, p in enumerate(parts.layer_paths) if path.startswith(f"{p}."))


def _silent(found: list[Probed], silent: list[str], parts: Anatomy) -> list[Probed]:
    """Leaves that never ran, where others of the same path but for numbers are writers."""
    patterns = {re.sub(r"\d+", "#", probed.path): probed.gain for probed in found}
    return [
        Probed(path, _layer_of(path, parts), patterns[re.sub(r"\d+", "#", path)])
        for path in silent
        if re.sub(r"\d+", "#", path) in patterns
    ]


def compare_with_probe(model: nn.Module, writers: Sequence[Writer] | None = None) -> ProbeReport:
    """Whether the writers found by name are those that the probe finds, with the same gains."""
    named = {w.path: w for w in (writers or residual_writers(model)) if w.layer >= 0}
    probed = {p.path: p for p in probe_writers(model)}
    off = 0.0
    for path in named.keys() & probed.keys():
        gain = named[path].gain
        expected = mx.ones(probed[path].gain.shape) if gain is None else gain
        cosine = (expected @ probed[path].gain) / (
            mx.linalg.norm(expected) * mx.linalg.norm(probed[path].gain)
        )
        off = max(off, abs(1.0 - abs(float(cosine))))
    missed, invented = probed.keys() - named.keys(), named.keys() - probed.keys()
    return ProbeReport(tuple(sorted(missed)), tuple(sorted(invented)), off)
