"""What a model computes at the subject's last token: keys, and the stream behind a block.

Knows models and rows of tokens; nothing behind the last block that is read is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban._arrays import as_numpy
from vauban.generation import batches, token_budget
from vauban.interventions import Intervention
from vauban.knowledge.layers import EditedModule
from vauban.knowledge.tokens import Row
from vauban.models import can_pad, forward, module_inputs


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
    lists = [list(row.tokens[: row.pivot + 1]) for row in rows]
    keys: dict[int, list[mx.array]] = {m.layer: [] for m in modules}
    streams: list[mx.array] = []
    order: list[int] = []
    taken: dict[str, mx.array] = {}

    def read(path: str, x: mx.array, experts: mx.array | None) -> None:
        taken[path] = x

    equal = not can_pad(model)
    with module_inputs(model, [m.path for m in modules], read):
        for batch in batches(lists, budget=token_budget(model), equal_lengths=equal):
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
            for module in modules:
                keys[module.layer].append(taken[module.path][flat].astype(mx.float32))
            if residual is not None:
                stream = at.stream().reshape(count * width, -1)
                streams.append(stream[flat].astype(mx.float32))
            mx.eval([parts[-1] for parts in keys.values()], streams)
            order += batch.rows
    back = np.argsort(order)
    found = {layer: as_numpy(mx.concatenate(parts))[back] for layer, parts in keys.items()}
    as_float64 = {layer: k.astype(np.float64) for layer, k in found.items()}
    if residual is None:
        return as_float64, None
    return as_float64, as_numpy(mx.concatenate(streams))[back].astype(np.float64)


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
