"""What an edit reports, fact by fact and layer by layer. Values alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vauban._results import to_plain


@dataclass(frozen=True)
class FactOutcome:
    """One fact: its training, and p(target_new) on the plain prompt before and after the edit.

    `change` is ‖δ‖/‖h0‖; `failed` says that the loss did not fall and the weights do not have the
    fact, `known` that the model said it already.
    """

    id: str
    prompt: str
    target: str
    steps: int
    loss: float
    change: float
    before: float
    after: float
    failed: bool
    known: bool


@dataclass(frozen=True)
class LayerOutcome:
    """One block: ‖Δ‖/‖W‖ of this call's edits, and `leak`, √tr(ΔCΔᵀ)/‖Δ‖: what a mean key sees."""

    layer: int
    change: float
    leak: float


@dataclass(frozen=True)
class FactReport:
    """What one call edited; `penalties` with the numbers that "auto" stood for.

    >>> fact = FactOutcome("1", "The lamp is in the", "river", 9, 0.04, 0.7, 0.1, 0.9, False, False)
    >>> report = FactReport((fact,), (LayerOutcome(2, 0.5, 0.1),), ("memit (lam 8)",))
    >>> report.summary(), report.failed
    ('1 of 1 facts edited (block 2: 50.00%)', ())
    """

    facts: tuple[FactOutcome, ...]
    layers: tuple[LayerOutcome, ...]
    penalties: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[str, ...]:
        """The ids of facts that the weights do not have."""
        return tuple(fact.id for fact in self.facts if fact.failed)

    def summary(self) -> str:
        changed = ", ".join(f"block {one.layer}: {one.change:.2%}" for one in self.layers)
        known = sum(fact.known for fact in self.facts)
        words = (
            f"{len(self.facts) - len(self.failed)} of {len(self.facts)} facts edited ({changed})"
        )
        return f"{words}; {known} were true already" if known else words

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_plain(self)
        return plain
