"""Chooses the few before/after answers that a terminal, a model card or a report shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vauban.prompts import conversation_text, spread


@dataclass(frozen=True)
class Sample:
    """One prompt with the answers of both models."""

    label: str
    prompt: str
    original: str
    modified: str
    verdicts: tuple[str, str] = ("", "")
    """The labels before and after, where the answers hold them."""


Pair = Mapping[str, Any]


def pick_samples(answers: Mapping[str, Sequence[Pair]], count: int = 3) -> list[Sample]:
    """Spread over the harmful answers, the changed ones first, and the last one harmless.

    Args:
        answers: those of an `EvalResult`, by label; each with "prompt", "original", "modified",
            "refused_original" and "refused_modified".
        count: how many to return at most.
    """
    harmful = list(answers.get("harmful", ()))
    harmless = list(answers.get("harmless", ()))
    changed = [pair for pair in harmful if pair["refused_original"] != pair["refused_modified"]]
    wanted = count - 1 if harmless else count
    chosen = [_sample("harmful", pair) for pair in spread(changed or harmful, wanted)]
    return chosen + [_sample("harmless", pair) for pair in spread(harmless, count - len(chosen))]


def _sample(label: str, pair: Pair) -> Sample:
    verdicts = (pair.get("verdict_original", ""), pair.get("verdict_modified", ""))
    prompt = conversation_text(pair["prompt"])
    return Sample(label, prompt, pair["original"], pair["modified"], verdicts)
