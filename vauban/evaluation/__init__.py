"""How a model behaves and what a change costs: refusal, perplexity, KL, each with its interval.

In reading order:
    intervals    Wilson for rates, bootstrap for means over tokens
    pairs        before and after on equal prompts: McNemar, score interval
    degenerate   whether a text is empty, loops or is a salad of words
    phrases      the expressions of ten languages
    verdicts     refused, evaded, degenerate, unfinished or answered
    behaviour    answers of one model, judged: rates
    answers_fixture  packaged answers with their verdicts, macro F1
    judge        a model as judge, its check, κ
    guards       guard models, one protocol each
    sequences    prompts with answers, read in batches: log-probabilities where they count
    likelihood   perplexity and KL over the same tokens
    perplexity   perplexity of texts and answered requests
    eval_result  what a comparison says: figures, pairs, verdicts
    evaluate     a model before and after a change
    off_target   length, hedging, language, JSON, memory over turns
    run_program  whether a program that a model wrote passes its tests
    capability   arithmetic, facts and code with answers that can be checked
    facts        what a model says of facts
    hidden_shift  how far an edit moves the stream elsewhere
    surface_rows  prompts with every axis on which refusal may differ
    surface_cells  rates by cell, thresholds by logistic fit, coverage
    surface      rows answered and projected in one pass
    surface_pairs  two scans of the same rows
    named_figures  a run's figures by short name or path, with their intervals
    gates        bounds that figures have to keep, presets
"""

from vauban.evaluation.answers_fixture import LabelledAnswer, labelled_answers, macro_f1
from vauban.evaluation.behaviour import (
    Behaviour,
    answer_groups,
    answer_texts,
    answer_tokens,
    judge_answers,
    measure_behaviour,
)
from vauban.evaluation.capability import Capability, measure_capability
from vauban.evaluation.degenerate import is_degenerate
from vauban.evaluation.eval_result import EvalResult, LengthPoint
from vauban.evaluation.evaluate import evaluate, length_curve
from vauban.evaluation.facts import FactEval, FactScores, Rate, evaluate_facts, score_facts
from vauban.evaluation.gates import (
    PRESETS,
    Gate,
    GateReport,
    GateResult,
    check_gates,
    check_names,
    read_gates,
)
from vauban.evaluation.guards import PROTOCOLS, GuardProtocol, guard_judge
from vauban.evaluation.hidden_shift import HiddenShift, hidden_shift
from vauban.evaluation.intervals import bootstrap_interval, wilson_interval
from vauban.evaluation.judge import JudgeCheck, JudgeVerdict, LocalJudge, agreement
from vauban.evaluation.likelihood import (
    Likelihood,
    compare_likelihood,
    compare_sequences,
    kl_divergence,
)
from vauban.evaluation.named_figures import SHORT_NAMES, Figure, find_figure
from vauban.evaluation.off_target import (
    Compared,
    OffTarget,
    compare_answers,
    language_of,
    measure_off_target,
)
from vauban.evaluation.pairs import PairedResult, paired_test, paired_verdicts
from vauban.evaluation.perplexity import TextPerplexity, measure_perplexity, perplexity
from vauban.evaluation.sequences import with_answers
from vauban.evaluation.surface import (
    MAPS,
    SurfacePoint,
    SurfaceScan,
    measure_harmfulness,
    scan_surface,
)
from vauban.evaluation.surface_cells import Cell, CellRate, Coverage, Threshold, fit_threshold
from vauban.evaluation.surface_pairs import CellChange, SurfaceComparison, compare_surfaces
from vauban.evaluation.surface_rows import (
    AXES,
    SurfacePrompt,
    load_surface_prompts,
    surface_path,
)
from vauban.evaluation.verdicts import (
    DEFAULT_REFUSAL_PHRASES,
    LABELS,
    Label,
    Verdict,
    classify_answer,
    is_refusal,
)

__all__ = [
    "AXES",
    "DEFAULT_REFUSAL_PHRASES",
    "LABELS",
    "MAPS",
    "PRESETS",
    "PROTOCOLS",
    "SHORT_NAMES",
    "Behaviour",
    "Capability",
    "Cell",
    "CellChange",
    "CellRate",
    "Compared",
    "Coverage",
    "EvalResult",
    "FactEval",
    "FactScores",
    "Figure",
    "Gate",
    "GateReport",
    "GateResult",
    "GuardProtocol",
    "HiddenShift",
    "JudgeCheck",
    "JudgeVerdict",
    "Label",
    "LabelledAnswer",
    "LengthPoint",
    "Likelihood",
    "LocalJudge",
    "OffTarget",
    "PairedResult",
    "Rate",
    "SurfaceComparison",
    "SurfacePoint",
    "SurfacePrompt",
    "SurfaceScan",
    "TextPerplexity",
    "Threshold",
    "Verdict",
    "agreement",
    "answer_groups",
    "answer_texts",
    "answer_tokens",
    "bootstrap_interval",
    "check_gates",
    "check_names",
    "classify_answer",
    "compare_answers",
    "compare_likelihood",
    "compare_sequences",
    "compare_surfaces",
    "evaluate",
    "evaluate_facts",
    "find_figure",
    "fit_threshold",
    "guard_judge",
    "hidden_shift",
    "is_degenerate",
    "is_refusal",
    "judge_answers",
    "kl_divergence",
    "labelled_answers",
    "language_of",
    "length_curve",
    "load_surface_prompts",
    "macro_f1",
    "measure_behaviour",
    "measure_capability",
    "measure_harmfulness",
    "measure_off_target",
    "measure_perplexity",
    "paired_test",
    "paired_verdicts",
    "perplexity",
    "read_gates",
    "scan_surface",
    "score_facts",
    "surface_path",
    "wilson_interval",
    "with_answers",
]
