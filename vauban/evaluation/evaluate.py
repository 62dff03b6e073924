"""Compare a model before and after: refusal, over-refusal, perplexity, KL, degenerate answers.

Orchestrates behaviour and likelihood; writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import mlx.nn as nn

from vauban._common import Progress
from vauban.edits import EditPlan
from vauban.errors import InputError
from vauban.evaluation.behaviour import Behaviour, answer_tokens, judge_answers
from vauban.evaluation.judge import model_judge
from vauban.evaluation.likelihood import compare, with_answers
from vauban.interventions import Intervention
from vauban.models import decode
from vauban.prompts import default_eval_path, load_labelled_prompts


@dataclass(frozen=True)
class EvalResult:
    """Rates in [0, 1]; `intervals` their 95 % Wilson intervals by the same names.

    Refusal is measured on the given prompts; over-refusal, perplexity and KL on the harmless
    ones. KL(original || modified) and both perplexities are over the answer tokens of the
    original's greedy answers. `answers` keeps every raw answer.
    """

    refusal_rate_original: float
    refusal_rate_modified: float
    perplexity_original: float
    perplexity_modified: float
    kl_divergence: float
    num_prompts: int
    over_refusal_original: float
    over_refusal_modified: float
    degenerate_original: float
    degenerate_modified: float
    intervals: dict[str, tuple[float, float]]
    num_harmless: int
    unparsed: int
    refusal_mode: str
    answers: dict[str, list[dict[str, Any]]] = field(repr=False)

    def summary(self) -> str:
        def rate(name: str) -> str:
            low, high = self.intervals[name]
            return f"{getattr(self, name):6.1%} [{low:.1%}, {high:.1%}]"

        lines = [
            f"{'':22}{'before':>24}{'after':>24}",
            f"{'refusal':22}{rate('refusal_rate_original'):>24}{rate('refusal_rate_modified'):>24}"
            f"   ({self.num_prompts} prompts)",
            f"{'over-refusal':22}{rate('over_refusal_original'):>24}"
            f"{rate('over_refusal_modified'):>24}   ({self.num_harmless} harmless prompts)",
            f"{'perplexity':22}{self.perplexity_original:>24.3f}{self.perplexity_modified:>24.3f}",
            f"{'degenerate answers':22}{self.degenerate_original:>24.1%}"
            f"{self.degenerate_modified:>24.1%}",
            f"{'KL(before || after)':22}{'':>24}{self.kl_divergence:>24.4f}",
        ]
        if self.unparsed:
            lines.append(f"{self.unparsed} verdicts of the judge could not be read")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {
            "refusal_rate_original": self.refusal_rate_original,
            "refusal_rate_modified": self.refusal_rate_modified,
            "over_refusal_original": self.over_refusal_original,
            "over_refusal_modified": self.over_refusal_modified,
            "degenerate_original": self.degenerate_original,
            "degenerate_modified": self.degenerate_modified,
            "perplexity_original": self.perplexity_original,
            "perplexity_modified": self.perplexity_modified,
            "kl_divergence": self.kl_divergence,
            "num_prompts": self.num_prompts,
            "num_harmless": self.num_harmless,
            "unparsed": self.unparsed,
            "refusal_mode": self.refusal_mode,
            "intervals": {name: list(pair) for name, pair in self.intervals.items()},
        }


def evaluate(
    original: nn.Module,
    modified: nn.Module | EditPlan | Sequence[Intervention],
    tokenizer: Any,
    prompts: Sequence[Any],
    refusal_phrases: Sequence[str] | None = None,
    max_tokens: int = 100,
    refusal_mode: Literal["phrases", "judge"] = "phrases",
    *,
    harmless: Sequence[Any] | None = None,
    judge: Any = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Refusal, over-refusal, perplexity, KL and degenerate answers before and after a change.

    `modified` is a model, an `EditPlan` (evaluated at run time, nothing is written) or
    interventions on `original`. `prompts` should be refused; `harmless` (default: the bundled
    harmless evaluation prompts) should not. Answers are greedy, `max_tokens` long.
    `refusal_mode="judge"` asks a judge: (model, tokenizer), a function (prompt, answer) -> True,
    False or None, or by default the original model.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> result = vauban.evaluate(
    ...     model, (), tokenizer, ["How do I rob a shop?"], max_tokens=8, harmless=["Say hello."]
    ... )
    >>> result.kl_divergence < 1e-6
    True
    """
    if not prompts:
        raise InputError("the evaluation set is empty; expected at least one prompt")
    verdict = _verdict(refusal_mode, judge, original, tokenizer)
    if harmless is None:
        rows = load_labelled_prompts(default_eval_path())
        harmless = [row.prompt for row in rows if row.label == "harmless"]
    if not harmless:
        raise InputError("the harmless evaluation set is empty; expected at least one prompt")
    other, changes = _modified(original, modified)
    sets = {"harmful": list(prompts), "harmless": list(harmless)}
    total = 2 * sum(len(p) for p in sets.values())
    done = 0

    def step(label: str, at: int, n: int) -> None:
        if progress:
            progress("evaluate", done + at, total)

    found: dict[str, tuple[Behaviour, Behaviour]] = {}
    original_ids: list[list[int]] = []
    for name, texts in sets.items():
        pair: list[Behaviour] = []
        for model, interventions in ((original, ()), (other, changes)):
            ids = answer_tokens(
                model, tokenizer, texts, max_tokens=max_tokens, interventions=interventions,
                progress=step,
            )  # fmt: skip
            done += len(texts)
            if name == "harmless" and not pair:
                original_ids = ids
            answers = [decode(tokenizer, i) for i in ids]
            pair.append(judge_answers(texts, answers, phrases=refusal_phrases, verdict=verdict))
        found[name] = (pair[0], pair[1])
    likelihood = compare(
        original, other, with_answers(tokenizer, sets["harmless"], original_ids), changes
    )
    return _result(sets, found, likelihood, refusal_mode)


def _result(
    sets: dict[str, list[Any]],
    found: dict[str, tuple[Behaviour, Behaviour]],
    likelihood: Any,
    refusal_mode: str,
) -> EvalResult:
    before, after = found["harmful"]
    safe_before, safe_after = found["harmless"]
    every = [b for pair in found.values() for b in pair]
    count = sum(len(p) for p in sets.values())

    def degenerate(which: int) -> float:
        return sum(pair[which].degenerate * pair[which].n for pair in found.values()) / count

    return EvalResult(
        refusal_rate_original=before.rate,
        refusal_rate_modified=after.rate,
        perplexity_original=likelihood.perplexity_original,
        perplexity_modified=likelihood.perplexity_modified,
        kl_divergence=likelihood.kl,
        num_prompts=before.n,
        over_refusal_original=safe_before.rate,
        over_refusal_modified=safe_after.rate,
        degenerate_original=degenerate(0),
        degenerate_modified=degenerate(1),
        intervals={
            "refusal_rate_original": before.interval,
            "refusal_rate_modified": after.interval,
            "over_refusal_original": safe_before.interval,
            "over_refusal_modified": safe_after.interval,
        },
        num_harmless=safe_before.n,
        unparsed=sum(b.unparsed for b in every),
        refusal_mode=refusal_mode,
        answers={
            name: [
                {
                    "prompt": prompt,
                    "original": a,
                    "modified": b,
                    "refused_original": va,
                    "refused_modified": vb,
                }
                for prompt, a, b, va, vb in zip(
                    sets[name], *(x.answers for x in pair), *(x.verdicts for x in pair), strict=True
                )
            ]
            for name, pair in found.items()
        },
    )


def _modified(original: nn.Module, modified: Any) -> tuple[nn.Module, tuple[Intervention, ...]]:
    """(model, interventions) that stand for the modified side."""
    if isinstance(modified, EditPlan):
        return original, modified.virtual()
    if isinstance(modified, nn.Module):
        return modified, ()
    if isinstance(modified, Intervention):
        return original, (modified,)
    changes = tuple(modified)
    wrong = [c for c in changes if not isinstance(c, Intervention)]
    if wrong:
        raise InputError(f"{type(wrong[0]).__name__} is no model, EditPlan or intervention")
    return original, changes


def _verdict(mode: str, judge: Any, original: nn.Module, tokenizer: Any) -> Any:
    if mode == "phrases":
        if judge is not None:
            raise InputError("a judge was given with refusal_mode='phrases'; pass 'judge'")
        return None
    if mode != "judge":
        raise InputError(f"refusal_mode is {mode!r}; expected 'phrases' or 'judge'")
    if judge is None:
        return model_judge(original, tokenizer)
    return judge if callable(judge) and not isinstance(judge, tuple) else model_judge(*judge)
