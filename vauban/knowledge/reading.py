"""What a model computes at the subject's last token: keys, and the stream behind a block.

Knows models and rows of tokens; nothing behind the last block that is read is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban._arrays import as_numpy
from vauban._common import probe_tokens
from vauban.errors import ArchitectureError
from vauban.generation import Batches, token_budget
from vauban.interventions import Intervention
from vauban.knowledge.layers import EditedModule
from vauban.knowledge.tokens import Row
from vauban.models import anatomy, around, can_pad, forward, module_inputs, swapped
from vauban.models.anatomy import is_half

# What rounding may do to a stream in half precision, relatively: some units of bfloat16's last bit.
_HALF = 2**-5


@dataclass(eq=False)
class StreamAt:
    """Keeps the stream at one residual as it passes, and changes it by `change` if there is one."""

    residual: int
    change_by: Callable[[mx.array], mx.array] | None = None
    seen: mx.array | None = field(default=None)

    def change(
        self, site: str, layer: int, n_layers: int, prefill: bool
    ) -> Callable[[mx.array], mx.array] | None:
        """At the input of block `residual` alone."""
        return self._pass if site == "block_input" and layer == self.residual else None

    def _pass(self, h: mx.array) -> mx.array:
        self.seen = h
        return h if self.change_by is None else self.change_by(h)

    def stream(self) -> mx.array:
        """(B, T, d) of the last pass."""
        assert self.seen is not None
        return self.seen


def read_facts(
    model: nn.Module,
    rows: Sequence[Row],
    modules: Sequence[EditedModule],
    residual: int | None = None,
    interventions: Sequence[Intervention] = (),
) -> tuple[dict[int, np.ndarray], np.ndarray | None]:
    """Keys (n, d0) by block and the stream (n, d) at `residual`, each at the rows' pivots, float64.

    Rows are cut behind their pivots: what follows cannot matter there.
    """
    paths = [path for module in modules for path in module.paths]
    inputs, stream = inputs_at_pivots(model, rows, paths, residual, interventions)
    keys = {m.layer: as_numpy(m.keys(inputs)).astype(np.float64) for m in modules}
    return keys, stream


def inputs_at_pivots(
    model: nn.Module,
    rows: Sequence[Row],
    paths: Sequence[str],
    residual: int | None = None,
    interventions: Sequence[Intervention] = (),
) -> tuple[dict[str, mx.array], np.ndarray | None]:
    """What the modules at `paths` read, (n, width) float32, and the stream (n, d) at `residual` in
    float64, each at the rows' pivots."""
    lists = [list(row.tokens[: row.pivot + 1]) for row in rows]
    inputs: dict[str, list[mx.array]] = {path: [] for path in paths}
    streams: list[mx.array] = []
    order: list[int] = []
    taken: dict[str, mx.array] = {}

    def read(path: str, x: mx.array, experts: mx.array | None) -> None:
        taken[path] = x

    equal = not can_pad(model)
    with module_inputs(model, paths, read):
        for batch in Batches(lists, budget=token_budget(model), equal_lengths=equal):
            at = StreamAt(-1 if residual is None else residual)
            forward(
                model,
                batch.tokens,
                lengths=batch.lengths,
                positions=None,
                logits=False,
                interventions=[*interventions, at],
            )
            count, width = batch.tokens.shape
            flat = mx.array([i * width + n - 1 for i, n in enumerate(batch.lengths)])
            for path, parts in inputs.items():
                parts.append(taken[path][flat].astype(mx.float32))
            if residual is not None:
                stream = at.stream().reshape(count * width, -1)
                streams.append(stream[flat].astype(mx.float32))
            mx.eval([parts[-1] for parts in inputs.values()], streams)
            order += batch.rows
    back = mx.array(np.argsort(order))
    joined = {path: mx.concatenate(parts)[back] for path, parts in inputs.items()}
    if residual is None:
        return joined, None
    return joined, as_numpy(mx.concatenate(streams)[back]).astype(np.float64)


def read_plain(
    model: nn.Module, rows: Sequence[Row], module: EditedModule, residual: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """The stream (n, d) at `residual` at the pivots, and what the norm behind the MLP reads, if
    there is one, in float64."""
    inputs, stream = inputs_at_pivots(model, rows, [module.norm or module.path], residual)
    assert stream is not None
    if module.norm is None:
        return stream, None
    return stream, as_numpy(inputs[module.norm]).astype(np.float64)


def check_written(model: nn.Module, module: EditedModule) -> None:
    """ArchitectureError unless what is added to W k arrives at the stream as `written` says.

    An experiment: one vector is added to what the matrix puts out, in two rows of probe tokens.
    """
    tokens = probe_tokens(9, anatomy(model).vocabulary)
    rows = [Row(tuple(tokens[:4]), 3), Row(tuple(tokens[4:]), 4)]
    inputs, before = inputs_at_pivots(model, rows, module.paths, module.layer + 1)
    assert before is not None
    size = np.abs(before).mean()
    added = size * np.cos(np.arange(len(module.weight())))

    def louder(inner: Callable[..., mx.array], x: mx.array, *rest: Any, **named: Any) -> mx.array:
        out = inner(x, *rest, **named)
        return out + mx.array(added.astype(np.float32)).astype(out.dtype)

    with swapped([around(module.module, louder)]):
        _, after = inputs_at_pivots(model, rows, module.paths, module.layer + 1)
    assert after is not None
    change = added * as_numpy(module.gates(inputs)).astype(np.float64)
    expected = module.written(change, None)
    if module.norm is not None:
        normed = as_numpy(inputs[module.norm]).astype(np.float64)
        expected = module.written(change, normed + change) - module.written(change, normed)
    noise = 0.02 * np.abs(expected).max() + _HALF * is_half(anatomy(model)) * np.abs(after)
    if after.shape != expected.shape or (np.abs(after - before - expected) > noise).any():
        raise ArchitectureError(
            f"block {module.layer} cannot hold a fact: what {module.path} puts out does not reach "
            "the stream as vauban knows it"
        )


def context_keys(
    keys: Mapping[int, np.ndarray], contexts: int, *, plain_half: bool = True
) -> dict[int, np.ndarray]:
    """(u, d0) from the keys of every fact in every context, (u * contexts, d0), facts outermost.

    Half the plain prompt's key and half the mean of the others' (Meng et al. 2023), or the mean of
    all (ROME).
    """

    def joined(k: np.ndarray) -> np.ndarray:
        k = k.reshape(-1, contexts, k.shape[1])
        if contexts == 1:
            return k[:, 0]
        whole: np.ndarray = k.mean(1)
        return 0.5 * (k[:, 0] + k[:, 1:].mean(1)) if plain_half else whole

    return {layer: joined(k) for layer, k in keys.items()}
