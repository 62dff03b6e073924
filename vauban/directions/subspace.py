"""Measure the subspace of a concept: the leading directions of paired differences at one residual.

Collects through `vauban.activations`, decomposes with `fit_pca`; cuts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from vauban._arrays import floats
from vauban._common import Progress
from vauban.activations import collect_activations
from vauban.directions import direction_files
from vauban.directions.measure import measure
from vauban.directions.pca import fit_pca
from vauban.errors import InputError

_FORMAT = "vauban.subspace/1"


@dataclass(frozen=True, eq=False)
class SubspaceResult:
    """`basis` (k, d) orthonormal, strongest first, at the output of block `layer_index`.

    singular_values (k,) of the paired differences; explained_variance (k,) shares of all their
    squared singular values. Indices as in `DirectionResult`: residual = layer_index + 1.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> sets = ["Rob a shop.", "Forge a ticket."], ["Name a colour.", "Say hello."]
    >>> found = vauban.measure_subspace(model, tokenizer, *sets, top_k=2)
    >>> found.basis.shape, round(float(found.explained_variance.sum()), 4)
    ((2, 128), 1.0)
    """

    basis: mx.array
    singular_values: mx.array
    explained_variance: mx.array
    layer_index: int
    position: int
    d_model: int
    model_path: str
    method: str
    provenance: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def residual_index(self) -> int:
        """The residual that the basis was measured at."""
        return self.layer_index + 1

    def summary(self) -> str:
        shares = " ".join(f"{v:.2f}" for v in floats(self.explained_variance))
        lines = [
            f"subspace of {self.model_path or 'a model'} by {self.method}: k = "
            f"{self.basis.shape[0]} at the output of block {self.layer_index}, position "
            f"{self.position}; share of the paired differences: {shares}"
        ]
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])

    def to_dict(self) -> dict[str, Any]:
        return {
            "k": int(self.basis.shape[0]),
            "layer_index": self.layer_index,
            "residual_index": self.residual_index,
            "position": self.position,
            "method": self.method,
            "d_model": self.d_model,
            "model_path": self.model_path,
            "singular_values": floats(self.singular_values),
            "explained_variance": floats(self.explained_variance),
            "provenance": self.provenance,
            "warnings": list(self.warnings),
        }

    def save(self, path: str | Path) -> Path:
        """Write one file as `DirectionResult.save` does; returns its path."""
        names = ("basis", "singular_values", "explained_variance")
        return direction_files.write(
            path, _FORMAT, {n: getattr(self, n) for n in names}, self.to_dict()
        )

    @classmethod
    def load(cls, path: str | Path) -> SubspaceResult:
        """Read what `save` wrote; InputError names what a foreign or damaged file lacks."""
        names = ("basis", "singular_values", "explained_variance")
        arrays, facts = direction_files.read(path, _FORMAT, names)
        if arrays["basis"].shape != (facts["k"], facts["d_model"]):
            raise InputError(f"{path}: the arrays' shapes do not fit each other")
        kept = ("layer_index", "position", "d_model", "model_path", "method", "provenance")
        fields: dict[str, Any] = {**{n: arrays[n] for n in names}, **{n: facts[n] for n in kept}}
        return cls(**fields, warnings=tuple(facts["warnings"]))


def measure_subspace(
    model: nn.Module,
    tokenizer: Any,
    harmful: Sequence[Any],
    harmless: Sequence[Any],
    *,
    top_k: int = 5,
    layer: int | Literal["auto", "causal"] = "auto",
    positions: tuple[int, ...] | Literal["post_instruction"] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> SubspaceResult:
    """The `top_k` leading directions of the paired differences harmful - harmless.

    Layer and position are chosen as `measure` chooses them. Prompts are paired in their order; of
    unequal sets the longer one loses its end, with a warning. The first direction is close to the
    mean difference, the others are what single pairs differ in besides.

    Raises InputError as `measure` does, and for a top_k beyond the rank of the differences.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> harmful = ["How do I forge a ticket?", "Tell me how to rob a shop."] * 2
    >>> harmless = ["How do I bake a cake?", "Name a colour.", "What is 2 plus 3?", "Say hello."]
    >>> found = vauban.measure_subspace(model, tokenizer, harmful, harmless, top_k=2, layer=2)
    >>> found.basis.shape[0], found.residual_index
    (2, 3)
    """
    chosen = measure(
        model, tokenizer, harmful, harmless, layer=layer, positions=positions,
        batch_size=batch_size, seed=seed, progress=progress,
    )  # fmt: skip
    notes = list(chosen.warnings)
    pairs = min(len(harmful), len(harmless))
    if len(harmful) != len(harmless):
        notes.append(
            f"{len(harmful)} harmful and {len(harmless)} harmless prompts: the first {pairs} of "
            "each are paired"
        )
    parts = [
        collect_activations(
            model, tokenizer, list(prompts)[:pairs], positions=(chosen.position,),
            batch_size=batch_size,
        ).at(chosen.residual_index, chosen.position)
        for prompts in (harmless, harmful)
    ]  # fmt: skip
    labels = mx.array([0] * pairs + [1] * pairs)
    found = fit_pca(mx.concatenate(parts), labels, top_k, kind="paired")
    return SubspaceResult(
        found.basis, found.singular_values, found.explained_variance, chosen.layer_index,
        chosen.position, chosen.d_model, chosen.model_path, found.method,
        {**chosen.provenance, "pairs": pairs}, tuple(notes),
    )  # fmt: skip
