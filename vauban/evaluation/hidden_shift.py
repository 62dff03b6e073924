"""How far an edit moves what a model represents elsewhere: the stream at the ends of prompts.

A deterministic form of AlphaEdit's figure 5 (Fang et al. 2025): principal components in place of
t-SNE. Knows models and prompts; draws nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.nn as nn
import numpy as np

from vauban.errors import InputError
from vauban.knowledge import read_facts
from vauban.knowledge.tokens import Row
from vauban.models import anatomy, check_same_vocabulary

# The 95 % quantile of χ² with two degrees of freedom, and the bins of a marginal density.
_ELLIPSE, _BINS = 5.991464547107979, 32


@dataclass(frozen=True)
class HiddenShift:
    """The stream behind block `layer` before and after.

    relative   mean ‖h' - h‖/‖h‖
    cka        linear CKA of both sets, 1 for equal geometry
    overlap    shared area of the two marginal densities along either principal component
    inside     share of the points after that lie in the 95 % ellipse of those before
    before, after   (n, 2) coordinates on the principal components of the points before

    >>> import numpy as np
    >>> before = np.random.default_rng(0).normal(size=(20, 4))
    >>> shift = shift_of(before, 2 * before)
    >>> round(shift.relative, 6), round(shift.cka, 6)
    (1.0, 1.0)
    """

    layer: int
    n: int
    relative: float
    cka: float
    overlap: tuple[float, float]
    inside: float
    before: np.ndarray = field(repr=False)
    after: np.ndarray = field(repr=False)

    def summary(self) -> str:
        return (
            f"stream behind block {self.layer}, {self.n} prompts: moved by {self.relative:.1%}, "
            f"CKA {self.cka:.4f}, {self.inside:.1%} inside the ellipse"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "n": self.n,
            "relative": self.relative,
            "cka": self.cka,
            "overlap": list(self.overlap),
            "inside": self.inside,
        }


def hidden_shift(
    original: nn.Module, modified: nn.Module, tokenizer: Any, prompts: Sequence[str], layer: int
) -> HiddenShift:
    """Compare the stream behind block `layer` at the last token of raw prompts.

    Raises InputError for fewer than three prompts, for a block that does not exist, and for models
    of different vocabularies or shapes.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> texts = ["The lamp is in the", "Name a colour", "Say hello"]
    >>> hidden_shift(model, model, tokenizer, texts, layer=2).relative
    0.0
    """
    if isinstance(prompts, str) or len(prompts) < 3:
        raise InputError("a shift needs at least three prompts")
    if not 0 <= layer < len(original.layers):
        raise InputError(f"block {layer} does not exist; the model has {len(original.layers)}")
    check_same_vocabulary(original, modified, "hidden_shift")
    widths = anatomy(original).d_model, anatomy(modified).d_model
    if widths[0] != widths[1] or layer >= len(modified.layers):
        raise InputError(
            f"hidden_shift compares the streams of one architecture; the original has "
            f"{len(original.layers)} blocks of width {widths[0]}, the modified one "
            f"{len(modified.layers)} of width {widths[1]}"
        )
    encoded = [tuple(int(i) for i in tokenizer.encode(text)) for text in prompts]
    rows = [Row(tokens, len(tokens) - 1) for tokens in encoded]
    streams = [read_facts(model, rows, [], layer + 1)[1] for model in (original, modified)]
    assert streams[0] is not None and streams[1] is not None
    return shift_of(streams[0], streams[1], layer)


def shift_of(before: np.ndarray, after: np.ndarray, layer: int = 0) -> HiddenShift:
    """The shift between two sets of vectors (n, d), row by row the same prompt."""
    mean = before.mean(0)
    axes = np.linalg.svd(before - mean, full_matrices=False)[2][:2]
    old, new = (before - mean) @ axes.T, (after - mean) @ axes.T
    variance = np.maximum(old.var(0, ddof=1), 1e-30)
    inside = ((new**2 / variance).sum(1) <= _ELLIPSE).mean()
    moved = np.linalg.norm(after - before, axis=1) / np.linalg.norm(before, axis=1)
    a, b = before - mean, after - after.mean(0)
    cross = np.linalg.norm(a.T @ b) ** 2
    size = float(np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
    alike = cross / max(size, 1e-30)
    return HiddenShift(
        layer, len(before), float(moved.mean()), float(alike),
        (_overlap(old[:, 0], new[:, 0]), _overlap(old[:, 1], new[:, 1])), float(inside), old, new,
    )  # fmt: skip


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """The area that two normalised histograms share."""
    both = np.concatenate([a, b])
    span = float(both.min()), float(both.max()) + 1e-12
    first, second = (np.histogram(x, bins=_BINS, range=span)[0] / len(x) for x in (a, b))
    return float(np.minimum(first, second).sum())
