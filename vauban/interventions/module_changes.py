"""Changes at named modules: the run-time form of a weight edit.

Knows module paths as text and arrays; computes no weights and knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import mlx.core as mx

from vauban.interventions.protocol import Change
from vauban.linalg import project_out


@runtime_checkable
class ModuleChange(Protocol):
    """What is done to the outputs of the modules at `paths`, and to what a tied head reads."""

    @property
    def paths(self) -> frozenset[str]: ...

    def output_change(self, path: str) -> Change | None:
        """The function for the output of the module at `path`, None where it is left alone."""
        ...

    def head_change(self, path: str) -> Change | None:
        """The function for what the tied head at `path` reads, None where it is left alone."""
        ...


@dataclass(frozen=True, eq=False)
class ModuleOutputs:
    """For each module path: y <- y - α Uᵀ U y with U (k, out) row-orthonormal.

    Cutting what a writer puts out equals cutting its weight and its bias:
    (W - α u uᵀ W) x + (b - α u uᵀ b) = y - α u (uᵀ y).

    `heads` holds embeddings whose matrix is the head as well: there the head's input is changed in
    the same way, E' h = (E - α E u uᵀ) h = E (h - α u (uᵀ h)).
    """

    factors: Mapping[str, tuple[mx.array, float]]
    heads: Mapping[str, tuple[mx.array, float]] = field(default_factory=dict)

    @property
    def paths(self) -> frozenset[str]:
        return frozenset((*self.factors, *self.heads))

    @property
    def width(self) -> int | None:
        """Components of the factors; all writers put out vectors of the stream."""
        bases = [basis for basis, _ in (*self.factors.values(), *self.heads.values())]
        return int(bases[0].shape[1]) if bases else None

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Change | None:
        """Nothing happens at stream sites; the change belongs to the modules."""
        return None

    def output_change(self, path: str) -> Change | None:
        return _cut(*self.factors[path]) if path in self.factors else None

    def head_change(self, path: str) -> Change | None:
        return _cut(*self.heads[path]) if path in self.heads else None


def _cut(basis: mx.array, alpha: float) -> Change:
    return lambda y: project_out(y, basis, alpha)


@dataclass(frozen=True, eq=False)
class ModuleWeights:
    """Modules that run with another matrix (and bias): for changes that no output change expresses.

    `weights` by module path, float, shaped like the module's unpacked matrix; `tied` names
    embeddings whose matrix is the head as well.
    """

    weights: Mapping[str, mx.array]
    biases: Mapping[str, mx.array]
    tied: frozenset[str] = frozenset()

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Change | None:
        """Nothing happens at stream sites; the change belongs to the modules."""
        return None
