"""The affine cut: what the stream carries along a direction is set to values instead of to zero.

After a whole cut nothing writes along d but constants. The embedding puts c_0 there with every
token, and the bias of block l's MLP c_(l+1) - c_l: the projection of residual l is c_l exactly.
Affine ablation (ACE, Marshall et al. 2024, at strength 0) as a weight edit. Knows writers and
arrays; the cut itself is `plan`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from vauban._arrays import floats
from vauban._common import RELATIVE_NOISE, probe_tokens
from vauban.edits.update import Update
from vauban.errors import InputError
from vauban.interventions import Add
from vauban.models import Writer, anatomy, branches, forward

_ELSEWHERE = "set the projection at run time instead: interventions=[AblateTo(direction, values)]"


def projection_values(values: float | Mapping[int, float], n_layers: int) -> list[float]:
    """c_0 ... c_L. A residual that is not named takes the value of the next one that is.

    Raises InputError when residual L has none or a residual does not exist.
    """
    if not isinstance(values, Mapping):
        return [float(values)] * (n_layers + 1)
    unknown = [r for r in values if not 0 <= r <= n_layers]
    if unknown or n_layers not in values:
        raise InputError(
            f"set_to names residuals {sorted(values)}; expected some of 0 to {n_layers}, the last "
            "one among them"
        )
    reversed_values: list[float] = []
    for residual in range(n_layers, -1, -1):
        reversed_values.append(
            float(values[residual]) if residual in values else reversed_values[-1]
        )
    return reversed_values[::-1]


def harmless_values(result: object) -> dict[int, float]:
    """The harmless class mean along the direction of a `DirectionResult`, residuals 1 to L."""
    means, direction = getattr(result, "means", None), getattr(result, "direction", None)
    if means is None or direction is None:
        raise InputError("set_to='harmless' needs a DirectionResult, which holds the class means")
    return dict(enumerate(floats(means[0] @ direction), start=1))


def add_constants(
    model: nn.Module,
    updates: Sequence[Update],
    writers: Sequence[Writer],
    direction: mx.array,
    values: Sequence[float],
) -> tuple[list[Update], tuple[Add, ...]]:
    """(updates with their offsets, the same constants as run-time additions).

    Raises InputError where a constant has no place: no bias in a block whose value differs from the
    next one's, an embedding that does not enter the stream by a factor.
    """
    parts = anatomy(model)
    placed: dict[str, mx.array] = {}
    adds = [Add(direction, values[0], 0)]
    placed[parts.embedding_path] = values[0] / _embedding_factor(model) * direction
    largest = max(map(abs, values))
    for layer in range(parts.n_layers):
        step = values[layer + 1] - values[layer]
        if abs(step) <= RELATIVE_NOISE * largest:
            continue
        path, factor = _last_bias(model, writers, layer)
        placed[path] = step / factor * direction
        adds.append(Add(direction, step, layer + 1))
    shifted = [replace(u, offset=placed.pop(u.path)) if u.path in placed else u for u in updates]
    if placed:
        raise InputError(f"{next(iter(placed))} is not among what is cut; {_ELSEWHERE}")
    return shifted, tuple(adds)


def _last_bias(model: nn.Module, writers: Sequence[Writer], layer: int) -> tuple[str, float]:
    """(path, factor to the stream) of the bias that is added last in a block."""
    block_writers = [w for w in writers if w.layer == layer]
    last = [w for w in block_writers if w.kind == "mlp"]
    if len(last) != 1 or not last[0].bias or last[0].gain is not None:
        raise InputError(
            f"block {layer} has no bias behind its MLP to carry a constant (writers: "
            f"{', '.join(w.path for w in block_writers)}); give one value for all residuals, or "
            f"{_ELSEWHERE}"
        )
    factors = [b.multiplier for b in branches(model) if (b.layer, b.site) == (layer, "mlp_output")]
    return last[0].path, factors[0]


def _embedding_factor(model: nn.Module) -> float:
    """s with residual 0 = s · embedding row; InputError where it is no such multiple."""
    parts = anatomy(model)
    tokens = mx.array([probe_tokens(16, parts.vocabulary)])
    rows = parts.embedding(tokens).astype(mx.float32)
    out = forward(model, tokens, positions="all", logits=False).residual
    assert out is not None
    stream = out[:, 0].astype(mx.float32)
    factor = float((rows * stream).sum() / (rows * rows).sum())
    if not float(mx.abs(stream - factor * rows).max()) <= 1e-2 * float(mx.abs(stream).max()):
        raise InputError(
            f"the embedding enters the stream through more than a factor; {_ELSEWHERE}"
        )
    return factor
