"""Run-time changes of the residual stream, as pure values over arrays. They know no model."""

from vauban.interventions.affine import AblateTo, Erase, Flip
from vauban.interventions.conditional import Conditional, ConditionalRun, shares_prefix, started
from vauban.interventions.outputs import ModuleOutputs, ModuleWeights
from vauban.interventions.values import SITES, Ablate, Add, Intervention, Project

__all__ = [
    "SITES",
    "Ablate",
    "AblateTo",
    "Add",
    "Conditional",
    "ConditionalRun",
    "Erase",
    "Flip",
    "Intervention",
    "ModuleOutputs",
    "ModuleWeights",
    "Project",
    "shares_prefix",
    "started",
]
