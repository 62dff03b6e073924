"""What the study fits at every layer and position, from one collection of activations.

Mean differences, INLP and its first classifier on the same prompts; LEACE on demand. Knows
activations and estimators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vauban._common import Progress
from vauban.activations import Activations, collect_activations
from vauban.config import StudyConfig
from vauban.directions import INLPResult, LeaceResult, fit_inlp, fit_inlp_batch, fit_leace
from vauban.prompts import post_instruction_positions

Key = tuple[int, int]
"""(position, residual), the position negative."""


@dataclass(frozen=True, eq=False)
class Fits:
    """What the interventions are made of, by (position, residual)."""

    activations: Activations
    """(n, L+1, P, d); the first `harmless` rows are the harmless prompts."""
    harmless: int
    inlp: dict[Key, INLPResult]

    @property
    def labels(self) -> mx.array:
        """(n,) 0 harmless, 1 harmful."""
        return (mx.arange(self.activations.values.shape[0]) >= self.harmless).astype(mx.int32)

    @property
    def n_layers(self) -> int:
        return int(self.activations.values.shape[1]) - 1

    def means(self, key: Key) -> tuple[mx.array, mx.array]:
        """Harmless and harmful mean (d,) at one place."""
        rows = self.activations.at(key[1], key[0])
        return rows[: self.harmless].mean(axis=0), rows[self.harmless :].mean(axis=0)

    def difference(self, key: Key) -> mx.array:
        """v = mean harmful - mean harmless (d,), raw (Arditi et al. 2024, eq. 1)."""
        low, high = self.means(key)
        return high - low

    def places(self) -> list[Key]:
        """Every candidate: all positions, the input of every block."""
        return [(p, r) for p in self.activations.positions for r in range(self.n_layers)]

    def basis(self, key: Key, rank: int | None = None) -> mx.array:
        """INLP's first `rank` directions in extraction order; row 0 has the length |v|.

        The length is what makes steering with the first direction comparable to ± k v.
        """
        rows = self.inlp[key].directions[:rank]
        size = mx.linalg.norm(self.difference(key))
        return mx.concatenate([rows[:1] * size, rows[1:]])

    def published(self, key: Key, seed: int = 0) -> mx.array:
        """The basis (k, d) that the published code of the study removes, for comparison.

        It stops at an accuracy of .55 and reads rank and directions off a float32 SVD of the sum
        of the projectors, singular values above 1e-7: rounding noise counts as directions, and
        their order is lost. LAPACK's float32 routine does that in MLX as it does in PyTorch, where
        the code runs (measured: rank 5 reads as 18 at d = 128, as 22 at d = 1024). How many are
        counted depends on the BLAS: one thread of OpenBLAS has added none where two have.
        """
        fitted = fit_inlp(
            self.activations.at(key[1], key[0]),
            self.labels,
            min_accuracy=0.55,
            max_rank=100,
            patience=1,
            seed=seed,
        )
        total = fitted.directions.T @ fitted.directions
        _, values, right = mx.linalg.svd(total, stream=mx.cpu)
        return right[: int((values > 1e-7).sum())]

    def classifier(self, key: Key) -> mx.array:
        """w of the first INLP classifier, scaled to |v|, harmful scoring higher (d,)."""
        return self.basis(key, 1)[0]

    def leace(self, key: Key) -> LeaceResult:
        """LEACE of the label at one place (Belrose et al. 2023)."""
        return fit_leace(self.activations.at(key[1], key[0]), self.labels)


def fit(
    model: nn.Module,
    tokenizer: Any,
    harmful: Sequence[Any],
    harmless: Sequence[Any],
    config: StudyConfig,
    progress: Progress | None = None,
) -> Fits:
    """Collect once at all post-instruction positions and fit INLP at every place.

    A place where the classes cannot be told apart has an INLP of rank 0.
    """
    positions = tuple(post_instruction_positions(tokenizer))
    collected = collect_activations(
        model, tokenizer, [*harmless, *harmful], positions=positions, progress=progress
    )
    labels = mx.arange(len(harmless) + len(harmful)) >= len(harmless)
    fitted = fit_inlp_batch(
        collected.values[:, :-1],
        labels.astype(mx.int32),
        C=config.inlp.C,
        max_rank=config.inlp.max_rank,
        min_accuracy=config.inlp.min_accuracy,
        seed=config.seed,
        progress=progress,
    )
    inlp = {(positions[column], residual): value for (residual, column), value in fitted.items()}
    return Fits(collected, len(harmless), inlp)
