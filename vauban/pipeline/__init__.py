"""The whole way from a configuration to a finished folder, and the stages it is made of."""

from vauban.pipeline.run import RunPlan, RunResult, run
from vauban.pipeline.sources import EvalSet, PromptSet

__all__ = ["EvalSet", "PromptSet", "RunPlan", "RunResult", "run"]
