"""Which blocks hold facts: causal tracing at the subject's last token (Meng et al. 2022, ROME).

The subject's embeddings are disturbed, one residual at its last token is put back, and the answer's
probability says how much passes through it. Knows models and rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban._arrays import as_numpy
from vauban.errors import ArchitectureError
from vauban.interventions import Change
from vauban.knowledge.facts import Fact
from vauban.knowledge.layers import edited_modules
from vauban.knowledge.tokens import encode_fact
from vauban.models import anatomy, forward

# Facts that are traced, noise in standard deviations of the embeddings, blocks that are edited, and
# the share of the depth in which they are looked for.
_FACTS, _NOISE, _WINDOW, _DEPTH = 8, 3.0, 3, 0.6


@dataclass(eq=False)
class _Disturbed:
    """Noise on the first `upto` tokens of the stream's start in every row; row r has residual r at
    the last of them put back, row 0 none."""

    noise: mx.array
    upto: int
    clean: mx.array

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Change | None:
        """At the input of every block."""
        if site != "block_input":
            return None
        return self._noisy if layer == 0 else lambda h: self._restored(h, layer)

    def _noisy(self, h: mx.array) -> mx.array:
        mask = (mx.arange(h.shape[1]) < self.upto)[None, :, None]
        return h + mask * self.noise[:, : h.shape[1]].astype(h.dtype)

    def _restored(self, h: mx.array, residual: int) -> mx.array:
        row = (mx.arange(h.shape[0]) == residual)[:, None, None]
        at = (mx.arange(h.shape[1]) == self.upto - 1)[None, :, None]
        return mx.where(row & at, self.clean[residual].astype(h.dtype), h)


def tracing_effects(model: nn.Module, tokenizer: Any, facts: Sequence[Fact]) -> np.ndarray:
    """(L,) by block how much of the answer's log-probability its output at the subject's end
    brings back, mean over the facts; what is traced is the model's own likeliest next token."""
    layers = anatomy(model).n_layers
    effects = np.zeros(layers)
    for number, fact in enumerate(facts):
        row = encode_fact(tokenizer, fact)
        tokens = mx.array([row.tokens])
        clean = forward(model, tokens, positions="all", logits="last")
        assert clean.logits is not None and clean.residual is not None
        answer = int(clean.logits[0, 0].argmax())
        stream = clean.residual[0].astype(mx.float32)
        spread = float(mx.sqrt(mx.var(stream[0])))
        shape = (1, len(row.tokens), stream.shape[-1])
        noise = _NOISE * spread * mx.random.normal(shape, key=mx.random.key(number))
        change = _Disturbed(noise, row.pivot + 1, stream[:, row.pivot])
        every = mx.broadcast_to(tokens, (layers + 1, tokens.shape[1]))
        logits = forward(model, every, positions=None, logits="last", interventions=[change]).logits
        assert logits is not None
        scores = as_numpy(logits[:, 0].astype(mx.float32)).astype(np.float64)
        logs = scores[:, answer] - np.logaddexp.reduce(scores, axis=1)
        effects += logs[1:] - logs[0]
    mean: np.ndarray = effects / len(facts)
    return mean


def trace_layers(model: nn.Module, tokenizer: Any, facts: Sequence[Fact]) -> tuple[int, ...]:
    """Up to three neighbouring blocks that end where the subject's last token matters most.

    Only blocks that can hold a fact count, and those in the first 60 % of the depth.

    Raises ArchitectureError where no block can.
    """
    layers = anatomy(model).n_layers
    effects = tracing_effects(model, tokenizer, facts[:_FACTS])

    def holds(layer: int) -> bool:
        try:
            edited_modules(model, [layer])
        except ArchitectureError:
            return False
        return True

    able = [layer for layer in range(max(1, int(_DEPTH * layers))) if holds(layer)]
    if not able:
        edited_modules(model, [0])
        raise ArchitectureError("no block in the first part of the model can hold a fact")
    best = max(able, key=lambda layer: effects[layer])
    chosen = [best]
    while len(chosen) < _WINDOW and chosen[0] - 1 in able:
        chosen.insert(0, chosen[0] - 1)
    return tuple(chosen)
