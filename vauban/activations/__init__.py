"""Collected residuals: the raw store, streaming moments, winsorisation."""

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
