"""Refusal, over-refusal, degenerate answers, perplexity and KL, each rate with its interval."""

from vauban.evaluation.behaviour import Behaviour, judge_answers, measure_behaviour
from vauban.evaluation.evaluate import EvalResult, evaluate
from vauban.evaluation.likelihood import (
    Likelihood,
    compare_likelihood,
    kl_divergence,
    perplexity,
)
from vauban.evaluation.refusal import DEFAULT_REFUSAL_PHRASES, is_degenerate, is_refusal
from vauban.evaluation.statistics import wilson_interval

__all__ = [
    "DEFAULT_REFUSAL_PHRASES",
    "Behaviour",
    "EvalResult",
    "Likelihood",
    "compare_likelihood",
    "evaluate",
    "is_degenerate",
    "is_refusal",
    "judge_answers",
    "kl_divergence",
    "measure_behaviour",
    "perplexity",
    "wilson_interval",
]
