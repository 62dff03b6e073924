"""The study of difference in means against INLP: interventions x scopes, matched, on any model.

In reading order:
    run_study            the order of the work, from configuration to folder
    fits                 what is fitted on one collection of activations
    matched_choice       a layer and position for every method, by one rule
    conditions           every method in every scope as interventions
    composition          what earlier cuts do to later directions
    instruments          everything that is measured of one condition
    figures              a figure with its interval and its better direction
    guard                safety judged by a guard model
    guard_result         what a guard said, counted; the organisms' stand-in for a guard
    exact_answers        task accuracy by equality
    benchmarks           MMLU and ARC through lm-eval
    lm_eval_model        a model under interventions as lm-eval sees it
    further_directions   what INLP's directions encode
    journal              finished work on disk, so that a killed study goes on
    tables, chart, page  the figures as text, as a chart, as one HTML page
"""

from vauban.study.benchmarks import BenchmarkResult, check_benchmarks, run_benchmarks
from vauban.study.exact_answers import TaskAccuracy, task_accuracy
from vauban.study.figures import BETTER, Delta, Metric
from vauban.study.guard import GuardJudge, parse_guard
from vauban.study.guard_result import GuardResult, GuardVerdict, StandInJudge
from vauban.study.run_study import StudyResult, run_study

__all__ = [
    "BETTER",
    "BenchmarkResult",
    "Delta",
    "GuardJudge",
    "GuardResult",
    "GuardVerdict",
    "Metric",
    "StandInJudge",
    "StudyResult",
    "TaskAccuracy",
    "check_benchmarks",
    "parse_guard",
    "run_benchmarks",
    "run_study",
    "task_accuracy",
]
