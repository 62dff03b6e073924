"""What a model answers under interventions: refusal and degenerate rates with intervals.

Generates through `vauban.models`; reads text through `refusal` or a judge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.nn as nn

from vauban._common import Progress
from vauban.errors import InputError
from vauban.evaluation.metrics import Metric
from vauban.evaluation.refusal import is_degenerate, is_refusal
from vauban.evaluation.statistics import wilson_interval
from vauban.interventions import Intervention
from vauban.models import decode, eos_ids, generate_tokens
from vauban.prompts import encode_chat

Verdict = Callable[[str, str], bool | None]


@dataclass(frozen=True)
class Behaviour:
    """Answers to `n` prompts; `rate` of refusals among those judged, 95 % Wilson `interval`.

    `unparsed` counts verdicts of a judge that could not be read; they are in no rate.
    """

    n: int
    refused: int
    rate: float
    interval: tuple[float, float]
    degenerate: float
    unparsed: int
    answers: list[str]
    verdicts: list[bool | None]

    def metric(self, name: Literal["non_refusal_harmful", "refusal_harmless"]) -> Metric:
        """The answers that do not refuse (harmful prompts) or do (harmless ones) as a `Metric`.

        Over the verdicts that could be read. Raises InputError for another name.
        """
        judged = self.n - self.unparsed
        if name == "non_refusal_harmful":
            return Metric.rate(name, judged - self.refused, judged)
        if name == "refusal_harmless":
            return Metric.rate(name, self.refused, judged)
        raise InputError(f"{name!r}: expected 'non_refusal_harmful' or 'refusal_harmless'")

    def to_dict(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "refused": self.refused,
            "rate": self.rate,
            "interval": list(self.interval),
            "degenerate": self.degenerate,
            "unparsed": self.unparsed,
        }


def answer_tokens(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    max_tokens: int,
    interventions: Iterable[Intervention] = (),
    progress: Progress | None = None,
) -> list[list[int]]:
    """Greedy answers as token ids."""
    return generate_tokens(
        model,
        [encode_chat(tokenizer, prompt) for prompt in prompts],
        eos=eos_ids(tokenizer),
        max_tokens=max_tokens,
        interventions=interventions,
        progress=progress,
    )


def judge_answers(
    prompts: Sequence[Any],
    answers: Sequence[str],
    *,
    phrases: Sequence[str] | None = None,
    verdict: Verdict | None = None,
) -> Behaviour:
    """Rates over answers; `verdict(prompt, answer)` replaces the phrases where given."""
    if verdict is None:
        found: list[bool | None] = [is_refusal(answer, phrases) for answer in answers]
    else:
        found = [verdict(str(p), a) for p, a in zip(prompts, answers, strict=True)]
    judged = [v for v in found if v is not None]
    refused = sum(judged)
    n = len(answers)
    return Behaviour(
        n=n,
        refused=refused,
        rate=refused / len(judged) if judged else 0.0,
        interval=wilson_interval(refused, len(judged)),
        degenerate=sum(map(is_degenerate, answers)) / n if n else 0.0,
        unparsed=len(found) - len(judged),
        answers=list(answers),
        verdicts=found,
    )


def measure_behaviour(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    interventions: Iterable[Intervention] = (),
    max_tokens: int = 100,
    phrases: Sequence[str] | None = None,
    verdict: Verdict | None = None,
    progress: Progress | None = None,
) -> Behaviour:
    """Generate greedily under `interventions` and judge: a `Behaviour`."""
    ids = answer_tokens(
        model,
        tokenizer,
        prompts,
        max_tokens=max_tokens,
        interventions=interventions,
        progress=progress,
    )
    answers = [decode(tokenizer, answer) for answer in ids]
    return judge_answers(prompts, answers, phrases=phrases, verdict=verdict)
