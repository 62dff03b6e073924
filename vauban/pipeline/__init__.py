"""From a configuration to a finished folder, and the stages on the way.

In reading order:
    run             the order of the stages; what is written
    search_run      the same with a cut that is searched for
    prompt_sets     which prompts a run uses, and where they come from
    preflight       what can be known before the model is loaded
    kept_direction  a measured direction outlives what fails after it
    stages          open a model, measure, read what remains of the direction
    cut_plan        the plan of the cut, and of the control beside it
    before_after    the rows of the before/after table
    surface_stage   the refusal surface before and after the cut
    edit_facts      an edit of facts, from its configuration to a folder
    provenance      versions, platform, hashes
"""

from vauban.pipeline.edit_facts import EditResult, edit_facts
from vauban.pipeline.prompt_sets import EvalSet, PromptSet
from vauban.pipeline.run import RunPlan, RunResult, run

__all__ = ["EditResult", "EvalSet", "PromptSet", "RunPlan", "RunResult", "edit_facts", "run"]
