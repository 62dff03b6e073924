"""Refusal, judged safety, perplexity, KL, task accuracy and benchmarks, each with its interval."""

from vauban.evaluation.accuracy import TaskAccuracy, task_accuracy
from vauban.evaluation.behaviour import (
    Behaviour,
    answer_tokens,
    judge_answers,
    measure_behaviour,
)
from vauban.evaluation.capability import BenchmarkResult, check_benchmarks, run_benchmarks
from vauban.evaluation.evaluate import EvalResult, evaluate
from vauban.evaluation.guard import GuardJudge, parse_guard
from vauban.evaluation.likelihood import (
    Likelihood,
    compare,
    compare_likelihood,
    kl_divergence,
    perplexity,
    with_answers,
)
from vauban.evaluation.metrics import BETTER, Delta, Metric
from vauban.evaluation.refusal import DEFAULT_REFUSAL_PHRASES, is_degenerate, is_refusal
from vauban.evaluation.standin import StandInJudge
from vauban.evaluation.statistics import bootstrap_interval, wilson_interval
from vauban.evaluation.texts import TextPerplexity, measure_perplexity
from vauban.evaluation.verdicts import GuardResult, GuardVerdict

__all__ = [
    "BETTER",
    "DEFAULT_REFUSAL_PHRASES",
    "Behaviour",
    "BenchmarkResult",
    "Delta",
    "EvalResult",
    "GuardJudge",
    "GuardResult",
    "GuardVerdict",
    "Likelihood",
    "Metric",
    "StandInJudge",
    "TaskAccuracy",
    "TextPerplexity",
    "answer_tokens",
    "bootstrap_interval",
    "check_benchmarks",
    "compare",
    "compare_likelihood",
    "evaluate",
    "is_degenerate",
    "is_refusal",
    "judge_answers",
    "kl_divergence",
    "measure_behaviour",
    "measure_perplexity",
    "parse_guard",
    "perplexity",
    "run_benchmarks",
    "task_accuracy",
    "wilson_interval",
    "with_answers",
]
