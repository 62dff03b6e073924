"""One figure of the study: its value, its interval, and which direction is better.

Knows numbers and names; measures nothing. What cannot be measured is "not applicable" with a
reason, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

from vauban._results import to_plain
from vauban.errors import InputError
from vauban.evaluation.intervals import wilson_interval

Better = Literal["higher", "lower"]

BETTER: Mapping[str, Better] = MappingProxyType(
    {
        "non_refusal_harmful": "higher",
        "unsafe_harmful": "lower",
        "refusal_harmless": "lower",
        "induced_refusal": "higher",
        "degenerate": "lower",
        "kl": "lower",
        "perplexity": "lower",
        "cross_entropy": "lower",
        "task_accuracy": "higher",
        "capability": "higher",
        "mmlu": "higher",
        "arc_cloze": "higher",
        "arc_letter5": "higher",
    }
)
"""The better direction of every figure of the study, in one place.

`non_refusal_harmful` is the attack success rate: higher means that an intervention which is meant
to remove refusal removes it. `unsafe_harmful` is read as harm done; as a share of harmful requests
that were really answered its gain has the other sign. `refusal_harmless` is over-refusal where
refusal is removed; where it is induced on purpose, read the raw value. Perplexity and
cross-entropy are better when lower, so their gain is minus their change.
"""


@dataclass(frozen=True)
class Delta:
    """A figure against its baseline: `change` = value - baseline, `gain` > 0 where it got better.

    `clipped` is the gain within [-1, 1], the scale of the study's figure. None throughout where
    either side is not applicable.
    """

    name: str
    better: Better
    change: float | None
    gain: float | None

    @property
    def clipped(self) -> float | None:
        return None if self.gain is None else max(-1.0, min(1.0, self.gain))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "clipped": self.clipped}


@dataclass(frozen=True)
class Metric:
    """`value` over `n` units with a 95 % `interval` (low, high); `better` says which way is good.

    `n` counts what the value is a mean over (`unit`): answers, questions, tokens. `method` names
    how the interval was made, or why there is none (`interval` None). Where the figure does not
    apply to a model, `value` and `interval` are None and `reason` says why.

    >>> before = Metric.rate("refusal_harmless", 1, 20)
    >>> after = Metric.rate("refusal_harmless", 3, 20)
    >>> after.value, after.better, round(after.delta(before).gain, 2)
    (0.15, 'lower', -0.1)
    """

    name: str
    value: float | None
    n: int
    interval: tuple[float, float] | None
    better: Better
    unit: str = "answers"
    method: str = "Wilson"
    reason: str = ""

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower"):
            raise InputError(f"{self.name}: better is {self.better!r}; expected 'higher', 'lower'")
        if (self.value is None) != bool(self.reason):
            raise InputError(f"{self.name}: a figure has a value or a reason why it has none")
        if self.value is not None and math.isnan(self.value):
            raise InputError(
                f"{self.name}: NaN is no value; say with `not_applicable` why it has none"
            )
        if self.value is None and self.interval is not None:
            raise InputError(f"{self.name}: an interval without a value")

    @classmethod
    def rate(
        cls, name: str, k: int, n: int, *, better: Better | None = None, unit: str = "answers"
    ) -> Metric:
        """k of n with its Wilson interval; `better` by default from `BETTER`.

        Raises InputError for an unknown name without `better`. n = 0 is not applicable.
        """
        direction = better or _known(name)
        if n == 0:
            return cls.not_applicable(name, f"no {unit} to measure", better=direction)
        return cls(name, k / n, n, wilson_interval(k, n), direction, unit)

    @classmethod
    def not_applicable(cls, name: str, reason: str, *, better: Better | None = None) -> Metric:
        """The figure that a model has not got, with the reason."""
        return cls(name, None, 0, None, better or _known(name), reason=reason, method="")

    @property
    def applies(self) -> bool:
        return self.value is not None

    def delta(self, baseline: Metric) -> Delta:
        """The change from `baseline`; raises InputError when it is another figure."""
        if (baseline.name, baseline.better) != (self.name, self.better):
            raise InputError(
                f"{self.name} ({self.better} is better) cannot be compared with {baseline.name} "
                f"({baseline.better} is better)"
            )
        if self.value is None or baseline.value is None:
            return Delta(self.name, self.better, None, None)
        change = self.value - baseline.value
        return Delta(self.name, self.better, change, change if self.better == "higher" else -change)

    def summary(self) -> str:
        """One line: name, value, interval, n and the better direction."""
        if self.value is None:
            return f"{self.name}: not applicable ({self.reason})"
        span = "" if self.interval is None else " [{:.4g}, {:.4g}]".format(*self.interval)
        return (
            f"{self.name}: {self.value:.4g}{span} ({self.n} {self.unit}, {self.better} is better)"
        )

    def to_dict(self) -> dict[str, Any]:
        return to_plain(self)


def _known(name: str) -> Better:
    """The direction of a named figure; a part behind ":" or "(" names a variant of it."""
    base = name.split(":")[0].split("(")[0].strip()
    if base not in BETTER:
        raise InputError(f"no better direction is known for {name!r}; give better='higher'|'lower'")
    return BETTER[base]
