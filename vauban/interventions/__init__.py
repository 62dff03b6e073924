"""Run-time changes of the residual stream, as pure values over arrays. They know no model."""

from vauban.interventions.outputs import ModuleOutputs, ModuleWeights
from vauban.interventions.values import SITES, Ablate, Add, Intervention, Project

__all__ = ["SITES", "Ablate", "Add", "Intervention", "ModuleOutputs", "ModuleWeights", "Project"]
