"""The front of a search on prompts that no trial saw: intervals, paired tests, the winner's loss.

A search picks what happened to look good on its validation prompts; this says what remains of it.
Knows run-time changes and prompts; knows no space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vauban._common import Progress
from vauban._results import to_plain
from vauban.evaluation import is_degenerate, wilson_interval
from vauban.evaluation.pairs import PairedResult, paired_test
from vauban.interventions import Intervention
from vauban.search.front import Trial
from vauban.search.short_answers import Class, Replies, ShortAnswers

Interval = tuple[float, float]


@dataclass(frozen=True)
class FreshScore:
    """A cut's figures on fresh prompts, shares with 95 % Wilson intervals.

    `paired` compares its refusals with the default cut's on the same harmful prompts (exact
    McNemar, not corrected for the number of cuts); None for the default cut and for no cut.
    `number` is the trial's, None where nothing is cut.
    """

    number: int | None
    refused: float
    refused_interval: Interval
    over_refused: float
    over_refused_interval: Interval
    kl: float
    degenerate: float
    paired: PairedResult | None

    def to_dict(self) -> dict[str, Any]:
        return to_plain(self)


@dataclass(frozen=True)
class Rescored:
    """The front on fresh prompts, in its order.

    unchanged  the model without a cut
    default    the default cut (trial 0)
    winner     the number of the trial that the search calls best
    loss       {"refused", "kl"}: the winner's figure here minus the one in the search
    default_loss  the same of the default cut. It comes from other prompts alone; what the winner
               loses beyond it is what the choice of the best of many had flattered
    """

    unchanged: FreshScore
    default: FreshScore
    front: tuple[FreshScore, ...]
    winner: int
    loss: Mapping[str, float]
    default_loss: Mapping[str, float]
    prompts: Mapping[str, int]
    notes: tuple[str, ...]

    def summary(self) -> str:
        harmful, harmless = (self.prompts[name] for name in ("harmful", "harmless"))
        lines = [f"on {harmful} harmful and {harmless} harmless fresh prompts"]
        for score in (self.unchanged, self.default, *self.front):
            low, high = score.refused_interval
            name = "no cut" if score.number is None else f"trial {score.number}"
            against = "" if score.paired is None else f"; {score.paired.summary()}"
            lines.append(
                f"{name}: refused {score.refused:.1%} [{low:.1%}, {high:.1%}], over-refused "
                f"{score.over_refused:.1%}, first-token KL {score.kl:.4f}{against}"
            )
        lines.append(
            f"lost since the search: trial {self.winner} refused {self.loss['refused']:+.1%}, KL "
            f"{self.loss['kl']:+.4f}; the default cut {self.default_loss['refused']:+.1%}, "
            f"{self.default_loss['kl']:+.4f}"
        )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        return to_plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Rescored:
        """What `to_dict` made."""
        front = tuple(_score(score) for score in values["front"])
        return cls(
            _score(values["unchanged"]), _score(values["default"]), front, values["winner"],
            values["loss"], values["default_loss"], values["prompts"], tuple(values["notes"]),
        )  # fmt: skip


def _score(values: Mapping[str, Any]) -> FreshScore:
    paired = values["paired"]
    if paired is not None:
        paired = PairedResult(**{**paired, "interval": tuple(paired["interval"])})
    pairs = {n: tuple(values[n]) for n in ("refused_interval", "over_refused_interval")}
    return FreshScore(**{**values, **pairs, "paired": paired})


def score_fresh(
    answers: ShortAnswers,
    changes: Mapping[int, Sequence[Intervention]],
    front: Sequence[Trial],
    default: Trial,
    winner: Trial,
    *,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> Rescored:
    """Score `changes` {trial number: run-time change}, 0 among them, on `answers`' prompts."""
    names: tuple[Class, ...] = ("harmful", "harmless")
    numbers: list[int | None] = [None, *sorted(changes)]
    every: dict[int | None, Sequence[Intervention]] = {None: ()}
    every.update(changes.items())
    total, done = len(numbers) * sum(map(len, answers.prompts.values())), 0

    def tell(label: str = "", answered: int = 0, _: int = 0) -> None:
        if progress:
            progress("score the front again", done + answered, total)

    tell()
    replies = {n: Replies(answers.kl(every[n]) if n is not None else 0.0) for n in numbers}
    for name in names:
        count = len(answers.prompts[name])
        asked = [(replies[number], every[number]) for number in numbers]
        answers.extend(asked, count, name, progress=tell)
        done += len(numbers) * count
    tell()
    refused = {
        number: {name: [answers.refusal(text) for text in reply.texts[name]] for name in names}
        for number, reply in replies.items()
    }

    def score(number: int | None) -> FreshScore:
        found = refused[number]
        rates = {name: sum(said) / len(said) for name, said in found.items()}
        spans = {name: wilson_interval(sum(said), len(said)) for name, said in found.items()}
        loops = [is_degenerate(text) for text in replies[number].texts["harmful"]]
        paired = paired_test(refused[0]["harmful"], found["harmful"]) if number else None
        return FreshScore(
            number, rates["harmful"], spans["harmful"], rates["harmless"], spans["harmless"],
            replies[number].kl, sum(loops) / len(loops), paired,
        )  # fmt: skip

    scores = {number: score(number) for number in numbers}

    def loss(trial: Trial) -> dict[str, float]:
        again = scores[trial.number]
        return {"refused": again.refused - trial.refused, "kl": again.kl - trial.kl}

    return Rescored(
        scores[None], scores[0], tuple(scores[trial.number] for trial in front), winner.number,
        loss(winner), loss(default),
        {name: len(answers.prompts[name]) for name in names}, tuple(notes),
    )  # fmt: skip
