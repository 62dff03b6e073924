"""Estimators, the measured direction as a value, layer scores and layer choice."""

from vauban.directions.estimators import Direction, fit_mean_difference
from vauban.directions.layers import select_target_layers
from vauban.directions.measure import measure, residual_limit
from vauban.directions.result import DirectionResult

__all__ = [
    "Direction",
    "DirectionResult",
    "fit_mean_difference",
    "measure",
    "residual_limit",
    "select_target_layers",
]
