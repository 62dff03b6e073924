"""Which matrices write to the residual stream, found by running the model, not by their names.

Every leaf of a block whose output is as wide as the stream is made to put out a constant instead;
it is a writer iff the block's output still depends on that constant. A balanced plus/minus one
constant also tells the gain between writer and stream. Knows modules; computes no edit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from vauban.models.anatomy import Anatomy, anatomy, is_embedding
from vauban.models.families import family_of
from vauban.models.paths import by_hand
from vauban.models.verify import verify_forward
from vauban.models.writers import Writer, residual_writers, unpacked_shape

_TOKENS = 8
# A dependence below this share of the constant itself is rounding.
_FLOOR = 1e-4


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
    """What each leaf puts out, by path; `counted` says which leaves ran."""

    def __init__(self) -> None:
        self.values: dict[str, mx.array] = {}
        self.counted: set[str] = set()


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


@contextmanager
def _constant(leaves: dict[str, nn.Module], constants: _Constants) -> Iterator[None]:
    """Let the leaves run (their shape is needed) and put out their constant instead."""
    changed = []
    try:
        for path, module in leaves.items():
            cls = type(module)
            changed.append((module, cls))

            def call(
                self: Any, *args: Any, _cls: type = cls, _path: str = path, **kwargs: Any
            ) -> mx.array:
                out = _cls.__call__(self, *args, **kwargs)  # type: ignore[operator]
                constants.counted.add(_path)
                return mx.broadcast_to(constants.values[_path].astype(out.dtype), out.shape)

            module.__class__ = type(f"Constant{cls.__name__}", (cls,), {"__call__": call})
        yield
    finally:
        for module, cls in changed:
            module.__class__ = cls
