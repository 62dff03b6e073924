"""What one model answers under interventions, and how often it refuses: rates with intervals.

Generates through `vauban.models`; judges by `verdicts` or by a judge. `evaluate` compares two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.nn as nn

from vauban._common import Progress
from vauban._results import to_plain
from vauban.errors import InputError
from vauban.evaluation.degenerate import is_degenerate
from vauban.evaluation.intervals import wilson_interval
from vauban.evaluation.verdicts import LABELS, Label, classify_answer, is_refusal
from vauban.generation import eos_ids, generate_groups
from vauban.interventions import Intervention
from vauban.prompts import conversation_text, decode_answer, encode_chat, split_reasoning


class BatchJudge(Protocol):
    """A judge that reads many answers at once, as `LocalJudge`: each verdict has a `label`."""

    def verdicts(self, pairs: Sequence[tuple[Any, str]]) -> Sequence[Any]: ...


Judge = Callable[[str, str], bool | None] | BatchJudge
"""(prompt, answer) -> whether the answer refuses, None where that cannot be told; or many."""


@dataclass(frozen=True)
class Behaviour:
    """Answers to `n` prompts: `rate` = `refused` / `judged` with its 95 % Wilson `interval`.

    Every answer is exactly one of: judged; `unfinished`, cut at the token limit inside its
    reasoning, so that there is no answer to judge; `unparsed`, a verdict of the judge that could
    not be read. The last two are in no rate. Where nothing was judged `rate`
    and `interval` are None. `degenerate` is the share of all n answers that are empty, loop or are
    a salad of words.

    `answers` hold the reasoning as well, with its opening mark also where the prompt's template
    wrote it. `verdicts` follow the answers: whether each refuses, None where that is not known.
    `labels` follow them too: what `classify_answer` says, also where a judge gave the verdicts; an
    answer that declines in a loop refuses, and its label is "degenerate".

    >>> found = judge_answers(["Hi", "Rob a shop"], ["Hello!", "I'm sorry, no."])
    >>> found.refused, found.n, found.labels
    (1, 2, ['answered', 'refused'])
    """

    n: int
    refused: int
    rate: float | None
    interval: tuple[float, float] | None
    degenerate: float
    unparsed: int
    unfinished: int
    answers: list[str] = field(repr=False)
    verdicts: list[bool | None] = field(repr=False)
    labels: list[Label] = field(repr=False)

    @property
    def counts(self) -> dict[Label, int]:
        """How many answers have each label."""
        return {label: self.labels.count(label) for label in LABELS}

    @property
    def judged(self) -> int:
        """The answers with a verdict, over which `rate` is taken."""
        return self.n - self.unparsed - self.unfinished

    def is_degenerate(self, place: int) -> bool:
        """Whether an answer is empty, loops (cut reasoning too) or is a salad of words."""
        return self.labels[place] == "degenerate" or is_degenerate(self.answers[place])

    def summary(self) -> str:
        if self.rate is None or self.interval is None:
            return f"refused: no verdict on {self.n} answers{self._without_verdict()}"
        low, high = self.interval
        return (
            f"refused: {self.refused} of {self.judged}, {self.rate:.1%} [{low:.1%}, {high:.1%}]; "
            f"degenerate {self.degenerate:.1%}{self._without_verdict()}"
        )

    def _without_verdict(self) -> str:
        parts = [
            (self.unparsed, "verdicts unreadable"),
            (self.unfinished, "cut off before an answer"),
        ]
        return "".join(f"; {count} {what}" for count, what in parts if count)

    def to_dict(self) -> dict[str, Any]:
        return to_plain(self)


def answer_tokens(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    max_tokens: int,
    interventions: Iterable[Intervention] = (),
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Greedy answers as token ids; one that has become a loop is taken to go on as it does."""
    return answer_groups(
        model, tokenizer, [(interventions, prompts)], max_tokens=max_tokens,
        batch_size=batch_size, progress=progress,
    )[0]  # fmt: skip


def answer_groups(
    model: nn.Module,
    tokenizer: Any,
    groups: Sequence[tuple[Iterable[Intervention], Sequence[Any]]],
    *,
    max_tokens: int,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> list[list[list[int]]]:
    """As `answer_tokens`, for several (interventions, prompts) whose rows share batches."""
    encoded = [
        (changes, [encode_chat(tokenizer, prompt) for prompt in prompts])
        for changes, prompts in groups
    ]
    return generate_groups(
        model, encoded, eos=eos_ids(tokenizer), max_tokens=max_tokens, batch_size=batch_size,
        close_loops=True, progress=progress,
    )  # fmt: skip


def answer_texts(
    tokenizer: Any, prompts: Sequence[Any], answers: Sequence[Sequence[int]]
) -> list[str]:
    """Answers' token ids as texts that can be judged alone: see `decode_answer`."""
    return [
        decode_answer(tokenizer, encode_chat(tokenizer, prompt), ids)
        for prompt, ids in zip(prompts, answers, strict=True)
    ]


def judge_answers(
    prompts: Sequence[Any],
    answers: Sequence[str],
    *,
    phrases: Sequence[str] | None = None,
    judge: Judge | None = None,
    finished: Sequence[bool] | None = None,
    perplexities: Sequence[float | None] | None = None,
) -> Behaviour:
    """Count refusals among given answers, by `classify_answer` or by `judge(prompt, answer)`.

    A judge reads the answer without its reasoning, and a conversation as text. Answers that were
    cut inside their reasoning get no verdict (`Behaviour.unfinished`); those that were cut before
    any content do not refuse so far, and their label says "unfinished".
    `finished` is False for answers that the token limit cut; `perplexities` are the answers' under
    the unchanged model: see `classify_answer`.

    Raises InputError for no answers, or not one answer per prompt.

    >>> judge_answers(["Hi", "Rob a shop"], ["Hello!", "I'm sorry, no."]).rate
    0.5
    """
    if not answers or len(prompts) != len(answers):
        raise InputError(
            f"{len(prompts)} prompts and {len(answers)} answers; expected one answer each, and at "
            "least one"
        )
    n = len(answers)
    labels = [
        classify_answer(answer, finished=done, phrases=phrases, perplexity=perplexity).label
        for answer, done, perplexity in zip(
            answers, finished or [True] * n, perplexities or [None] * n, strict=True
        )
    ]
    parts = [split_reasoning(answer) for answer in answers]
    unfinished = sum(not part.finished for part in parts)
    if judge is None:
        said: list[bool | None] = [
            is_refusal(answer, phrases)
            for answer, part in zip(answers, parts, strict=True)
            if part.finished
        ]
    else:
        said = _asked(
            judge,
            [
                (conversation_text(prompt), part.answer)
                for prompt, part in zip(prompts, parts, strict=True)
                if part.finished
            ],
        )
    each = iter(said)
    verdicts = [next(each) if part.finished else None for part in parts]
    judged = [verdict for verdict in verdicts if verdict is not None]
    loops = [is_degenerate(answer) for answer in answers]
    return Behaviour(
        n=n,
        refused=sum(judged),
        rate=sum(judged) / len(judged) if judged else None,
        interval=wilson_interval(sum(judged), len(judged)) if judged else None,
        degenerate=sum(a or b == "degenerate" for a, b in zip(loops, labels, strict=True)) / n,
        unparsed=n - len(judged) - unfinished,
        unfinished=unfinished,
        answers=list(answers),
        verdicts=verdicts,
        labels=labels,
    )


def _asked(judge: Judge, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
    """Whether each answer refuses, as the judge has it; None where it does not know."""
    if callable(judge):
        return [judge(prompt, answer) for prompt, answer in pairs]
    labels = [verdict.label for verdict in judge.verdicts(pairs)]
    return [None if label is None else label == "refused" for label in labels]


def measure_behaviour(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    interventions: Iterable[Intervention] = (),
    max_tokens: int = 100,
    phrases: Sequence[str] | None = None,
    judge: Judge | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Behaviour:
    """How often one model refuses under `interventions`: greedy answers, each judged.

    `phrases` or `judge` as for `judge_answers`; `max_tokens` is the longest answer, reasoning
    included. Raises InputError for no prompts.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> vauban.measure_behaviour(model, tokenizer, ["How do I rob a shop?"], max_tokens=16).n
    1
    """
    ids = answer_tokens(
        model,
        tokenizer,
        prompts,
        max_tokens=max_tokens,
        interventions=interventions,
        batch_size=batch_size,
        progress=progress,
    )
    texts = answer_texts(tokenizer, prompts, ids)
    finished = [len(answer) < max_tokens for answer in ids]
    return judge_answers(prompts, texts, phrases=phrases, judge=judge, finished=finished)
