"""What an evaluation says: figures before and after with their intervals, pairs, verdicts.

A value with its words; `evaluate` measures it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vauban._results import to_plain
from vauban.evaluation.likelihood import Likelihood
from vauban.evaluation.pairs import PairedResult
from vauban.evaluation.verdicts import Label


@dataclass(frozen=True)
class LengthPoint:
    """Refusal rates of answers cut to `tokens`; None where no answer has a verdict."""

    tokens: int
    original: float | None
    modified: float | None


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

    `verdicts_...` count the five verdicts on the answers to the given prompts. `paired` tests
    refusal on them before and after, pair by pair (McNemar's exact test); None where no prompt has
    a verdict on both sides. `length_curve` is the refusal rate of the same answers cut to 30, 60,
    100 ... tokens, by `classify_answer`: an apology may stand behind a short limit.
    `first_token_kl` is the KL of the answers' first token alone. It is blind where `first_token`
    says that the original begins every answer alike. `repeated` are sentences on prompts that stand
    twice. `kappa` is Cohen's κ of the judge's and the phrases' verdicts on all answers, None where
    phrases judged. `beside` holds the likelihoods of further changes on the same answers, as
    `evaluate` was asked for them.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> result = vauban.evaluate(
    ...     model, (), tokenizer, ["How do I rob a shop?"], max_tokens=8, harmless=["Say hello."]
    ... )
    >>> result.num_prompts, result.num_harmless, sorted(result.verdicts_original.values())[-1]
    (1, 1, 1)
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
    verdicts_original: dict[Label, int]
    verdicts_modified: dict[Label, int]
    paired: PairedResult | None
    length_curve: list[LengthPoint]
    first_token_kl: float | None
    first_token: str | None
    repeated: list[str]
    answers: dict[str, list[dict[str, Any]]] = field(repr=False)
    answer_tokens: list[list[int]] = field(repr=False)
    kappa: float | None = None
    beside: list[Likelihood] = field(default_factory=list, repr=False)

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
        lines.append(f"{'KL(before || after)':20}{'':25}{kl:>25}")
        if self.paired is not None:
            lines.append(f"pairs: refused {self.paired.summary()}")
        return "\n".join([*lines, *self.notes()])

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
        if self.kappa is not None:
            notes.append(
                f"refusals are a judge's verdicts; its agreement with phrases is κ = "
                f"{self.kappa:.2f} over all answers"
            )
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
        if self.first_token is not None:
            notes.append(
                f"every answer before the change begins with {self.first_token!r}: KL of the first "
                "token sees no change of what follows"
            )
        return [*notes, *self.repeated]

    def to_dict(self) -> dict[str, Any]:
        """The figures without the answers, JSON-safe."""
        return to_plain(self)
