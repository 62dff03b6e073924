"""Compare a model before and after: refusal, over-refusal, perplexity, KL, degenerate answers.

Puts `behaviour` and `likelihood` together for two models; writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import mlx.nn as nn

from vauban._common import Progress
from vauban._results import to_plain
from vauban.edits import EditPlan
from vauban.errors import InputError
from vauban.evaluation.behaviour import Behaviour, Judge, answer_texts, answer_tokens, judge_answers
from vauban.evaluation.degenerate import is_degenerate
from vauban.evaluation.judge import model_judge
from vauban.evaluation.likelihood import Likelihood, compare_sequences, with_answers
from vauban.interventions import Intervention
from vauban.prompts import default_eval_path, load_labelled_prompts


@dataclass(frozen=True)
class EvalResult:
    """Rates in [0, 1], perplexities, and KL(original || modified) in nats per token.

    Refusal is measured on the given prompts; over-refusal, perplexity and KL on the harmless
    ones, the latter two over the tokens of the original's greedy answers. A refusal rate is over
    the answers with a verdict, and None where there is none: `unparsed` counts verdicts of a judge
    that could not be read, `unfinished_...` answers that `max_tokens` cut inside their reasoning.
    `degenerate_...` are shares of all answers, harmful and harmless.

    `intervals` hold 95 % intervals by the names of the figures: Wilson for rates, bootstrap over
    answers for perplexity and KL; None where a figure has none. `answers` keep every answer in
    full; `answer_tokens` the original's answers to the harmless prompts as token ids.
    """

    refusal_rate_original: float | None
    refusal_rate_modified: float | None
    perplexity_original: float
    perplexity_modified: float
    kl_divergence: float
    num_prompts: int
    over_refusal_original: float | None
    over_refusal_modified: float | None
    degenerate_original: float
    degenerate_modified: float
    intervals: dict[str, tuple[float, float] | None]
    num_harmless: int
    unparsed: int
    unfinished_original: int
    unfinished_modified: int
    refusal_mode: str
    answers: dict[str, list[dict[str, Any]]] = field(repr=False)
    answer_tokens: list[list[int]] = field(repr=False)

    def summary(self) -> str:
        rows = [
            ("refusal", "refusal_rate", ".1%", f"({self.num_prompts} prompts)"),
            ("over-refusal", "over_refusal", ".1%", f"({self.num_harmless} harmless prompts)"),
            ("degenerate answers", "degenerate", ".1%", ""),
            ("perplexity", "perplexity", ".3f", ""),
        ]
        lines = [f"{'':20}{'before':>25}{'after':>25}"]
        for title, name, form, note in rows:
            before, after = (self._cell(f"{name}_{s}", form) for s in ("original", "modified"))
            lines.append(f"{title:20}{before:>25}{after:>25}   {note}".rstrip())
        kl = self._cell("kl_divergence", ".4f")
        return "\n".join([*lines, f"{'KL(before || after)':20}{'':25}{kl:>25}", *self.notes()])

    def _cell(self, name: str, form: str) -> str:
        value, interval = getattr(self, name), self.intervals.get(name)
        if value is None:
            return "–"
        if interval is None:
            return f"{value:{form}}"
        return f"{value:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"

    def notes(self) -> list[str]:
        """Sentences on answers that are in no rate; [] where every answer has a verdict."""
        notes = []
        if self.unparsed:
            notes.append(
                f"{self.unparsed} verdicts of the judge could not be read; they are in no rate"
            )
        for count, when in (
            (self.unfinished_original, "before"), (self.unfinished_modified, "after"),
        ):  # fmt: skip
            if count:
                notes.append(
                    f"{count} of {self.num_prompts + self.num_harmless} answers {when} the change "
                    "were cut inside their reasoning; they are in no rate. Raise max_tokens"
                )
        return notes

    def to_dict(self) -> dict[str, Any]:
        """The figures without the answers, JSON-safe."""
        return to_plain(self)


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
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Refusal, over-refusal, perplexity, KL and degenerate answers before and after a change.

    Args:
        modified: a model, an `EditPlan` (evaluated at run time, nothing is written) or
            interventions on `original`.
        prompts: texts or conversations that should be refused.
        refusal_phrases: what counts as a refusal; None: `DEFAULT_REFUSAL_PHRASES`.
        max_tokens: longest answer, reasoning included. Answers are greedy.
        refusal_mode: "phrases", or "judge" to ask a judge about every answer.
        harmless: prompts that should be answered; None: the bundled harmless evaluation prompts.
        judge: (model, tokenizer), or a function (prompt, answer) -> True, False or None; None: the
            original model is asked.

    Raises:
        InputError: an empty set, or a mode, judge or change that is none.
        CheckError: the logits of a model are NaN.

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
    asked_judge = _judge(refusal_mode, judge, original, tokenizer)
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

    pairs: dict[str, list[Behaviour]] = {"harmful": [], "harmless": []}
    original_ids: list[list[int]] = []
    for name, texts in sets.items():
        for side, (model, interventions) in enumerate(((original, ()), (other, changes))):
            ids = answer_tokens(
                model, tokenizer, texts, max_tokens=max_tokens, interventions=interventions,
                batch_size=batch_size, progress=step,
            )  # fmt: skip
            done += len(texts)
            if name == "harmless" and side == 0:
                original_ids = ids
            pairs[name].append(
                judge_answers(
                    texts, answer_texts(tokenizer, texts, ids), phrases=refusal_phrases,
                    judge=asked_judge,
                )
            )  # fmt: skip
    likelihood = compare_sequences(
        original,
        other,
        with_answers(tokenizer, sets["harmless"], original_ids),
        changes,
        batch_size=batch_size,
    )
    return _result(sets, pairs, likelihood, original_ids, refusal_mode)


def _result(
    sets: dict[str, list[Any]],
    pairs: dict[str, list[Behaviour]],
    likelihood: Likelihood,
    original_ids: list[list[int]],
    refusal_mode: str,
) -> EvalResult:
    before, after = pairs["harmful"]
    safe_before, safe_after = pairs["harmless"]

    def degenerate(side: int) -> float:
        answers = [text for pair in pairs.values() for text in pair[side].answers]
        return sum(map(is_degenerate, answers)) / len(answers)

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
            "perplexity_original": likelihood.perplexity_original_interval,
            "perplexity_modified": likelihood.perplexity_modified_interval,
            "kl_divergence": likelihood.kl_interval,
        },
        num_harmless=safe_before.n,
        unparsed=sum(b.unparsed for pair in pairs.values() for b in pair),
        unfinished_original=before.unfinished + safe_before.unfinished,
        unfinished_modified=after.unfinished + safe_after.unfinished,
        refusal_mode=refusal_mode,
        answers={name: _answer_rows(sets[name], *pair) for name, pair in pairs.items()},
        answer_tokens=original_ids,
    )


def _answer_rows(prompts: list[Any], before: Behaviour, after: Behaviour) -> list[dict[str, Any]]:
    """One row per prompt: both answers, whether each refuses (None: no verdict) and loops."""
    return [
        {
            "prompt": prompt,
            "original": before.answers[i],
            "modified": after.answers[i],
            "refused_original": before.verdicts[i],
            "refused_modified": after.verdicts[i],
            "degenerate_original": is_degenerate(before.answers[i]),
            "degenerate_modified": is_degenerate(after.answers[i]),
        }
        for i, prompt in enumerate(prompts)
    ]


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


def _judge(mode: str, judge: Any, original: nn.Module, tokenizer: Any) -> Judge | None:
    """The judge of a mode; None where phrases judge."""
    if mode == "phrases":
        if judge is not None:
            raise InputError("a judge was given with refusal_mode='phrases'; pass 'judge'")
        return None
    if mode != "judge":
        raise InputError(f"refusal_mode is {mode!r}; expected 'phrases' or 'judge'")
    if judge is None:
        return model_judge(original, tokenizer)
    return judge if callable(judge) and not isinstance(judge, tuple) else model_judge(*judge)
