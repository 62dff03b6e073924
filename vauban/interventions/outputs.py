"""A low-rank change at the output of named modules: the run-time form of a weight edit.

Knows module paths as text and arrays; computes no weights and knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import mlx.core as mx


@dataclass(frozen=True, eq=False)
class ModuleOutputs:
    """For each module path: y <- y - α U^T U y with U (k, out) row-orthonormal.

    Cutting what a writer puts out equals cutting its weight and its bias:
    (W - α u u^T W) x + (b - α u u^T b) = y - α u (u^T y).

    `heads` holds embeddings whose matrix is the head as well: there the head's input is changed in
    the same way, E' h = (E - α E u u^T) h = E (h - α u (u^T h)).
    """

    factors: Mapping[str, tuple[mx.array, float]]
    heads: Mapping[str, tuple[mx.array, float]] = field(default_factory=dict)

    def change(
        self, site: str, layer: int, n_layers: int, prefill: bool
    ) -> Callable[[mx.array], mx.array] | None:
        """Nothing happens at stream sites; the change belongs to the modules."""
        return None

    def output_change(self, path: str) -> Callable[[mx.array], mx.array] | None:
        """The function for the output of the module at `path`, None where it is left alone."""
        return _cut(*self.factors[path]) if path in self.factors else None

    def head_change(self, path: str) -> Callable[[mx.array], mx.array] | None:
        """The function for what the tied head at `path` reads, None where it is left alone."""
        return _cut(*self.heads[path]) if path in self.heads else None


def _cut(basis: mx.array, alpha: float) -> Callable[[mx.array], mx.array]:
    def cut(y: mx.array) -> mx.array:
        x = y.astype(mx.float32)
        return (x - alpha * (x @ basis.T) @ basis).astype(y.dtype)

    return cut


@dataclass(frozen=True, eq=False)
class ModuleWeights:
    """Modules that run with another matrix (and bias): for changes that no output change expresses.

    `weights` by module path, float, shaped like the module's unpacked matrix; `tied` names
    embeddings whose matrix is the head as well.
    """

    weights: Mapping[str, mx.array]
    biases: Mapping[str, mx.array]
    tied: frozenset[str] = frozenset()

    def change(
        self, site: str, layer: int, n_layers: int, prefill: bool
    ) -> Callable[[mx.array], mx.array] | None:
        """Nothing happens at stream sites; the change belongs to the modules."""
        return None
