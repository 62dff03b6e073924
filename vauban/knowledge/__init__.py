"""Facts and how a model is made to hold others: keys, values, updates, a ledger.

In reading order:

layers      the matrices that hold facts
key_stats   the second moment of a layer's keys
penalty     what an update pays for, and what it may not touch
updates     ridge with history, ROME, EMMET
filters     RECT, PRUNE, SPHERE, projection
"""

from vauban.knowledge.filters import projected, prune, rect, sphere
from vauban.knowledge.key_stats import KeyStats, collect_key_stats
from vauban.knowledge.layers import edited_modules
from vauban.knowledge.penalty import Penalty, penalty, protected_directions
from vauban.knowledge.updates import emmet_update, ridge_update, rome_update

__all__ = [
    "KeyStats",
    "Penalty",
    "collect_key_stats",
    "edited_modules",
    "emmet_update",
    "penalty",
    "projected",
    "protected_directions",
    "prune",
    "rect",
    "ridge_update",
    "rome_update",
    "sphere",
]
