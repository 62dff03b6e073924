"""Everything that is measured of one condition, with the same prompts, texts and judge for all.

Knows held-out rows, texts, a judge and benchmarks; knows interventions as values, not how they
were found. Every figure is a `Metric`: value, interval, better direction, or why it has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import mlx.nn as nn

from vauban.config import StudyConfig
from vauban.errors import CheckError, InputError
from vauban.evaluation import (
    Behaviour,
    answer_groups,
    answer_texts,
    answer_tokens,
    compare_likelihood,
    is_degenerate,
    judge_answers,
    measure_capability,
    measure_perplexity,
)
from vauban.interventions import Intervention
from vauban.models import load
from vauban.pipeline.prompt_sets import EvalSet
from vauban.prompts import LabelledPrompt, answer_chats, load_texts
from vauban.report import shorten
from vauban.study.benchmarks import check_benchmarks, run_benchmarks
from vauban.study.exact_answers import task_accuracy
from vauban.study.figures import Metric
from vauban.study.guard import GuardJudge
from vauban.study.guard_result import GuardResult, StandInJudge

Judge = Callable[[Sequence[LabelledPrompt], Sequence[str]], GuardResult]

_SAMPLES = 2
_NO_GUARD = "no guard model was named"


@dataclass(eq=False)
class Instruments:
    """The measuring set-up of one model; `measure` applies it to one condition after another."""

    model: nn.Module
    tokenizer: Any
    rows: EvalSet
    config: StudyConfig
    judge: Judge | None
    texts: dict[str, list[Any]] = field(default_factory=dict)

    @classmethod
    def prepare(
        cls, model: nn.Module, tokenizer: Any, rows: EvalSet, config: StudyConfig
    ) -> Instruments:
        """Load texts and guard; raises InputError for what cannot be read, benchmarks included."""
        if config.bench.tasks:
            check_benchmarks(config.bench.tasks, config.bench.include_path)
        return cls(
            model, tokenizer, rows, config, make_judge(config, rows), text_sets(config, rows)
        )

    @cached_property
    def _unchanged(self) -> list[list[int]]:
        """Greedy answers of the unchanged model to the harmless prompts, on which KL is taken."""
        return answer_tokens(
            self.model, self.tokenizer, self.rows.texts("harmless"),
            max_tokens=self.config.eval.max_tokens,
        )  # fmt: skip

    def measure(
        self, remove: Sequence[Intervention], induce: Sequence[Intervention] | None
    ) -> dict[str, Any]:
        """All figures of one condition: {"metrics": [...], "guard": ..., "samples": [...]}."""
        asked = [("harmful", remove), ("harmless", remove)]
        asked += [] if induce is None else [("how_to", induce)]
        refused, over, *induced_form = self._behaviours(asked)
        induced = induced_form[0] if induced_form else None
        guard = None if self.judge is None else self.judge(self.rows.harmful, refused.answers)
        degenerate = [is_degenerate(text) for text in (*refused.answers, *over.answers)]
        metrics = [
            Metric.rate("non_refusal_harmful", refused.judged - refused.refused, refused.judged),
            guard.metric() if guard else Metric.not_applicable("unsafe_harmful", _NO_GUARD),
            Metric.rate("refusal_harmless", over.refused, over.judged),
            Metric.rate("induced_refusal", induced.refused, induced.judged)
            if induced
            else Metric.not_applicable("induced_refusal", "this method has no inducing form"),
            *(metric for name in self.texts for metric in self._perplexity(name, remove)),
            self._tasks(remove),
            *self._capability(remove),
            *self._benchmarks(remove),
            Metric.rate("degenerate", sum(degenerate), len(degenerate)),
            self._kl(remove),
        ]
        samples = zip(self.rows.texts("harmful", _SAMPLES), refused.answers, strict=False)
        return {
            "metrics": [metric.to_dict() for metric in metrics],
            "guard": None if guard is None else guard.to_dict(verdicts=False),
            "samples": [{"prompt": p, "answer": shorten(answer, 90)} for p, answer in samples],
        }

    def _behaviours(self, asked: Sequence[tuple[str, Sequence[Intervention]]]) -> list[Behaviour]:
        """Answers to the prompts of each kind under its changes, in common batches, judged."""
        settings = self.config.eval
        groups = [(changes, self.rows.texts(kind)) for kind, changes in asked]
        every = answer_groups(
            self.model, self.tokenizer, groups, max_tokens=settings.max_tokens
        )  # fmt: skip
        return [
            judge_answers(
                prompts, answer_texts(self.tokenizer, prompts, ids),
                phrases=settings.refusal_phrases,
                finished=[len(answer) < settings.max_tokens for answer in ids],
            )
            for (_, prompts), ids in zip(groups, every, strict=True)
        ]  # fmt: skip

    def _perplexity(self, name: str, remove: Sequence[Intervention]) -> list[Metric]:
        """Perplexity of one set of texts, and its logarithm."""
        figures = (f"perplexity: {name}", f"cross_entropy: {name}")
        try:
            found = measure_perplexity(
                self.model, self.tokenizer, self.texts[name], interventions=remove, name=name,
                seed=self.config.seed,
            )  # fmt: skip
        except CheckError as error:
            return [Metric.not_applicable(figure, str(error)) for figure in figures]
        values = (
            (found.perplexity, found.perplexity_interval),
            (found.cross_entropy, found.interval),
        )
        return [
            Metric(figure, value, found.tokens, interval, "lower", "tokens", found.method)
            for figure, (value, interval) in zip(figures, values, strict=True)
        ]

    def _tasks(self, remove: Sequence[Intervention]) -> Metric:
        rows = [row for row in self.rows.harmless if row.get("answer")]
        if not rows:
            return Metric.not_applicable("task_accuracy", "no held-out row has an answer")
        return task_accuracy(self.model, self.tokenizer, rows, interventions=remove).metric()

    def _capability(self, remove: Sequence[Intervention]) -> list[Metric]:
        """The tasks written here, a figure for each kind; [] where they are not asked for."""
        bench = self.config.bench
        foreign = self.rows.origin != "model folder"
        if not (foreign if bench.capability is None else bench.capability):
            return []
        found = measure_capability(
            self.model, self.tokenizer, interventions=remove, limit=bench.capability_limit
        )
        return [
            Metric.rate(f"capability: {kind}", found.correct[kind], count, unit="tasks")
            for kind, count in found.n.items()
        ]

    def _benchmarks(self, remove: Sequence[Intervention]) -> list[Metric]:
        bench = self.config.bench
        if not bench.tasks:
            reason = "no lm-eval task was named in [bench]"
            return [Metric.not_applicable(name, reason) for name in ("mmlu", "arc_cloze")]
        try:
            results = run_benchmarks(
                self.model, self.tokenizer, bench.tasks, num_fewshot=bench.num_fewshot,
                limit=bench.limit, include_path=bench.include_path, interventions=remove,
                seed=self.config.seed,
            )  # fmt: skip
        except CheckError as error:
            reason = str(error)
            return [Metric.not_applicable(task, reason, better="higher") for task in bench.tasks]
        return [result.metric() for result in results.values()]

    def _kl(self, remove: Sequence[Intervention]) -> Metric:
        """KL(unchanged || changed), nats per token of the unchanged answers to harmless prompts."""
        prompts = self.rows.texts("harmless")
        try:
            found = compare_likelihood(
                self.model, self.tokenizer, prompts, self._unchanged, interventions=remove
            )
        except CheckError as error:
            return Metric.not_applicable("kl", str(error))
        return Metric(
            "kl", found.kl, found.tokens, found.kl_interval, "lower", "tokens",
            "bootstrap over answers, 2000 resamples, seed 0",
        )  # fmt: skip


def make_judge(config: StudyConfig, rows: EvalSet) -> Judge | None:
    """The guard that the configuration names, the stand-in where rows have templates, or None."""
    named = config.guard.model
    templated = all(row.get("template") for row in rows.harmful)
    if named is None:
        return StandInJudge() if templated else None
    if named == "stand-in":
        if not templated:
            raise InputError(
                f"{rows.path}: [guard] model is 'stand-in', but not every harmful row has a "
                "'template' to compare the answer with; name a guard model"
            )
        return StandInJudge()
    guard, tokenizer = load(named)
    return GuardJudge(guard, tokenizer, min_words=config.guard.min_words)


def text_sets(config: StudyConfig, rows: EvalSet) -> dict[str, list[Any]]:
    """{name: texts}, one set of running text and one of answered requests.

    A model that brings its own prompts is measured on its own world unless the configuration names
    something else: on general text the perplexity of an organism is in the thousands.
    """
    settings = config.texts
    prompts = rows.texts("harmless")
    answered = answer_chats(rows.harmless)
    at_home = rows.origin == "model folder"
    plain = settings.plain or ("own" if at_home else "plain")
    chat = settings.chat or ("own" if at_home and answered else "chat")
    if chat == "own" and not answered:
        raise InputError(f"{rows.path}: [texts] chat is 'own', but no harmless row has an 'answer'")
    limit = settings.limit
    return {
        "plain": prompts[:limit] if plain == "own" else load_texts(plain, limit=limit),
        "chat": list(answered[:limit]) if chat == "own" else load_texts(chat, limit=limit),
    }
