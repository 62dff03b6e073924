"""How well a direction separates two classes, from projections alone. Knows numbers only.

Each takes projections of shape (n, ...) and returns one number per trailing index.
"""

from __future__ import annotations

import numpy as np


def gap(negative: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Difference of the mean projections: grows with the norm of the residual."""
    return positive.mean(0) - negative.mean(0)


def cohens_d(negative: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Gap over the pooled standard deviation: free of scale."""
    a, b = len(negative), len(positive)
    spread = (max(a - 1, 1) * _variance(negative) + max(b - 1, 1) * _variance(positive)) / max(
        a + b - 2, 1
    )
    return gap(negative, positive) / np.sqrt(np.maximum(spread, 1e-24))


def _variance(values: np.ndarray) -> np.ndarray:
    return values.var(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def auc(negative: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Chance that a harmful prompt projects further than a harmless one; ties count half."""
    wins = (positive[:, None] > negative[None]).mean((0, 1))
    ties = (positive[:, None] == negative[None]).mean((0, 1))
    return wins + ties / 2


def silhouette(negative: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Mean silhouette of the two classes on the line (Rousseeuw 1987)."""

    def one_side(own: np.ndarray, other: np.ndarray) -> np.ndarray:
        inside = np.abs(own[:, None] - own[None]).sum(1) / max(len(own) - 1, 1)
        across = np.abs(own[:, None] - other[None]).mean(1)
        return (across - inside) / np.maximum(np.maximum(across, inside), 1e-12)

    return np.concatenate([one_side(negative, positive), one_side(positive, negative)]).mean(0)
