"""One layer's update as thin factors, by method; what it leaves alone; the norm anchor.

Arrays, settings and penalties; knows no model.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from vauban.knowledge.ledger import EditSettings
from vauban.knowledge.penalty import Penalty
from vauban.knowledge.updates import ridge_rows

# EMMET's slack (Gupta et al. 2024).
_SLACK = 0.1


def update_factor(
    method: str, rule: Penalty, keys: np.ndarray, plain: np.ndarray, history: np.ndarray | None
) -> np.ndarray:
    """B (u, d0): the update is residualsᵀ B. `plain` are the keys of the prompts alone (ROME)."""
    if method == "rome":
        row = rule.inverse(keys)
        scaled: np.ndarray = row / (row @ plain.T)
        return scaled
    if method == "emmet":
        row = rule.inverse(keys)
        gram = row @ keys.T + _SLACK * np.eye(len(keys))
        solved: np.ndarray = np.linalg.solve(gram, row)
        return solved
    return ridge_rows(keys, rule, history)


def protected_by(settings: EditSettings, rule: Penalty) -> mx.array:
    """(r, d0) what "+P" takes out of an update: the penalty's directions, or those of `tau`."""
    if settings.filter != "project" or len(rule.protected):
        return rule.protected
    return rule.leading(**settings.of_protection())


def norm_anchored(
    z: np.ndarray, h0: np.ndarray, before: np.ndarray, anchor: float | None
) -> tuple[np.ndarray, float]:
    """The values (u, d) after what the MLP is to write, v = v0 + δ, got the length `anchor`.

    `before` is v0 (u, d). Without an anchor it is the mean length of these v. A fact that wants
    more than twice as much gets no change (NAS, arXiv 2602.02543).

    >>> import numpy as np
    >>> norm_anchored(np.array([[3.0, 0.0]]), np.zeros((1, 2)), np.zeros((1, 2)), 2.0)[0].tolist()
    [[2.0, 0.0]]
    """
    wanted = before + (z - h0)
    norms = np.linalg.norm(wanted, axis=1, keepdims=True)
    length = float(norms.mean()) if anchor is None else anchor
    scaled = np.where(norms > 2 * length, before, wanted * length / norms)
    anchored: np.ndarray = h0 - before + scaled
    return anchored, length
