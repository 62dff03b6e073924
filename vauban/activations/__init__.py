"""Collected residuals: the raw store, streaming moments, winsorisation.

In reading order:
    collect      residuals at chosen positions of prompts, batch by batch or all together
    moments      count, mean and variance of a stream
    winsorize    components capped at their quantiles
"""

from vauban.activations.collect import Activations, collect_activations, stream_activations
from vauban.activations.moments import ActivationMoments
from vauban.activations.winsorize import winsorize

__all__ = [
    "ActivationMoments",
    "Activations",
    "collect_activations",
    "stream_activations",
    "winsorize",
]
