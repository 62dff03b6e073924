"""How a model behaves and what a change costs: refusal, perplexity, KL, each with its interval.

In reading order:
    intervals    Wilson for rates, bootstrap for means over tokens
    pairs        before and after on equal prompts: McNemar, score interval
    degenerate   whether a text is empty, loops or is a salad of words
    phrases      the expressions of ten languages
    verdicts     refused, evaded, degenerate, unfinished or answered
    behaviour    answers of one model, judged: rates
    judge        a model as judge of refusals
    likelihood   perplexity and KL over the same tokens
    perplexity   perplexity of texts and answered requests
    evaluate     a model before and after a change
    facts        what a model says of facts
    hidden_shift  how far an edit moves the stream elsewhere
"""

from vauban.evaluation.behaviour import (
    Behaviour,
    answer_texts,
    answer_tokens,
    judge_answers,
    measure_behaviour,
)
from vauban.evaluation.degenerate import is_degenerate
from vauban.evaluation.evaluate import EvalResult, evaluate
from vauban.evaluation.facts import FactEval, FactScores, Rate, evaluate_facts
from vauban.evaluation.hidden_shift import HiddenShift, hidden_shift
from vauban.evaluation.intervals import bootstrap_interval, wilson_interval
from vauban.evaluation.likelihood import (
    Likelihood,
    compare_likelihood,
    compare_sequences,
    kl_divergence,
    with_answers,
)
from vauban.evaluation.pairs import PairedResult, paired_test
from vauban.evaluation.perplexity import TextPerplexity, measure_perplexity, perplexity
from vauban.evaluation.verdicts import (
    DEFAULT_REFUSAL_PHRASES,
    LABELS,
    Label,
    Verdict,
    classify_answer,
    is_refusal,
)

__all__ = [
    "DEFAULT_REFUSAL_PHRASES",
    "LABELS",
    "Behaviour",
    "EvalResult",
    "FactEval",
    "FactScores",
    "HiddenShift",
    "Label",
    "Likelihood",
    "PairedResult",
    "Rate",
    "TextPerplexity",
    "Verdict",
    "answer_texts",
    "answer_tokens",
    "bootstrap_interval",
    "classify_answer",
    "compare_likelihood",
    "compare_sequences",
    "evaluate",
    "evaluate_facts",
    "hidden_shift",
    "is_degenerate",
    "is_refusal",
    "judge_answers",
    "kl_divergence",
    "measure_behaviour",
    "measure_perplexity",
    "paired_test",
    "perplexity",
    "wilson_interval",
    "with_answers",
]
