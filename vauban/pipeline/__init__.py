"""The whole way from a configuration to a finished folder, and the stages it is made of."""

from vauban.pipeline.prompt_sets import EvalSet, PromptSet
from vauban.pipeline.run import RunPlan, RunResult, run

__all__ = ["EvalSet", "PromptSet", "RunPlan", "RunResult", "run"]
