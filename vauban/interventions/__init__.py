"""Run-time changes of the residual stream, as frozen values over arrays. They know no model.

In reading order:

protocol         what an intervention is, its sites and scopes, and how one is started on a batch
removal          take a direction out or set it: `Ablate`, `Project`, `Flip`, `Erase`, `AblateTo`
steering         put something in: `Add`, `Patch`, and `Conditional` for some prompts only
module_changes   the run-time form of a weight edit, at the outputs of named modules
by_row           other interventions for other rows of a batch
"""

from vauban.interventions.by_row import ByRow
from vauban.interventions.module_changes import ModuleChange, ModuleOutputs, ModuleWeights
from vauban.interventions.protocol import (
    SITES,
    Change,
    Intervention,
    PromptIntervention,
    as_interventions,
    check_width,
    composed,
    shares_prefix,
    started,
)
from vauban.interventions.removal import Ablate, AblateTo, Erase, Flip, Project
from vauban.interventions.steering import Add, Conditional, Patch
