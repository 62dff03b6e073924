"""The selection rule of Arditi et al. (2024) on scores alone. Knows numbers, runs nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from vauban.errors import InputError

Record = Mapping[str, Any]


class NoCandidate(InputError):
    """Every candidate was filtered out: the thresholds, the tokens or the directions are wrong."""


@dataclass(frozen=True, eq=False)
class SelectionResult:
    """The chosen (position, residual `layer`) and what became of every candidate.

    kept       candidates that passed all filters, best first
    dropped    the others, each with its `reason`
    records    all candidates in the order given: position, layer, bypass, induce, kl; a score is
               None where it was not needed
    direction  (d,) the chosen candidate as given, None from `select_from_scores`
    baseline   mean refusal log-odds without intervention: harmful, harmless
    mass       probability of the refusal tokens on the harmful prompts without intervention

    >>> rows = [{"position": -1, "layer": r, "bypass": -r, "induce": 1, "kl": r} for r in (0, 1)]
    >>> found = select_from_scores(rows, 2)
    >>> found.layer, found.dropped[0]["reason"]
    (0, 'residual 1 is beyond the first 1')
    """

    position: int
    layer: int
    kept: tuple[Record, ...]
    dropped: tuple[Record, ...]
    records: tuple[Record, ...] = ()
    direction: mx.array | None = None
    kind: str = ""
    scope: str = ""
    refusal_tokens: tuple[int, ...] = ()
    baseline: dict[str, float] = field(default_factory=dict)
    mass: float | None = None
    thresholds: dict[str, float | None] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def summary(self) -> str:
        best = self.kept[0]
        lines = [
            f"residual {self.layer}, position {self.position} of "
            f"{len(self.kept) + len(self.dropped)} candidates ({len(self.kept)} passed): bypass "
            f"{best['bypass']:+.2f}, induce {best['induce']:+.2f}, KL {best['kl']:.3f}"
        ]
        if self.baseline:
            lines.append(
                f"refusal log-odds without intervention: harmful {self.baseline['harmful']:+.2f}, "
                f"harmless {self.baseline['harmless']:+.2f}; refusal tokens hold {self.mass:.2f} "
                "of the probability on harmful prompts"
            )
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])

    def to_dict(self) -> dict[str, Any]:
        return {
            "position": self.position,
            "layer": self.layer,
            "kind": self.kind,
            "scope": self.scope,
            "refusal_tokens": list(self.refusal_tokens),
            "baseline": dict(self.baseline),
            "mass": self.mass,
            "thresholds": dict(self.thresholds),
            "kept": [dict(r) for r in self.kept],
            "dropped": [dict(r) for r in self.dropped],
            "warnings": list(self.warnings),
        }


def layer_limit(n_layers: int, prune_layers: float) -> int:
    """Residuals from here on are no candidates: int(L · (1 - prune_layers))."""
    if not 0.0 <= prune_layers < 1.0:
        raise InputError(f"prune_layers is {prune_layers}; expected a share in [0, 1)")
    return int(n_layers * (1.0 - prune_layers))


def drop_reason(
    record: Record, limit: int, kl_threshold: float | None, induce_threshold: float | None
) -> str:
    """Why a candidate is out by what is known of it, "" when nothing speaks against it yet."""
    for name in ("bypass", "induce", "kl"):
        if record[name] is not None and math.isnan(record[name]):
            return f"{name} is NaN"
    if record["layer"] >= limit:
        return f"residual {record['layer']} is beyond the first {limit}"
    if kl_threshold is not None and record["kl"] is not None and record["kl"] > kl_threshold:
        return f"KL {record['kl']:.4f} above {kl_threshold}"
    induce = record["induce"]
    if induce_threshold is not None and induce is not None and induce < induce_threshold:
        return f"induce {induce:.4f} below {induce_threshold}"
    return ""


def select_from_scores(
    records: Sequence[Record],
    n_layers: int,
    *,
    kl_threshold: float | None = 0.1,
    induce_threshold: float | None = 0.0,
    prune_layers: float = 0.2,
) -> SelectionResult:
    """Apply the rule to candidates with `position`, `layer` (residual), `bypass`, `induce`, `kl`.

    Out are candidates with a NaN score, residuals >= int(L · (1 - prune_layers)), KL above its
    threshold, induce below its own (boundary values stay). Of the rest the smallest bypass wins,
    ties go to the earlier position, then the earlier residual (Arditi et al. 2024, appendix C). A
    threshold of None turns its filter off. A record may carry a `reason` of its own to be out, and
    a score of None where it is out already.

    Raises InputError for missing keys or scores, NoCandidate when nothing is left, with the counts.

    >>> rows = [{"position": -1, "layer": r, "bypass": -r, "induce": 1, "kl": r} for r in (0, 1)]
    >>> select_from_scores(rows, 2).layer
    0
    """
    limit = layer_limit(n_layers, prune_layers)
    kept: list[Record] = []
    dropped: list[Record] = []
    for number, record in enumerate(records):
        missing = [n for n in ("position", "layer", "bypass", "induce", "kl") if n not in record]
        if missing:
            raise InputError(f"record {number} has no {missing[0]!r}; it has {sorted(record)}")
        reason = record.get("reason") or drop_reason(record, limit, kl_threshold, induce_threshold)
        if reason:
            dropped.append({**record, "reason": reason})
            continue
        unknown = [n for n in ("bypass", "induce", "kl") if record[n] is None]
        if unknown:
            raise InputError(f"record {number} is still in, but its {unknown[0]} is None")
        kept.append(record)
    if not kept:
        words = Counter(" ".join(r["reason"].split()[:1]) for r in dropped)
        counts = ", ".join(f"{n} by {word}" for word, n in words.most_common())
        close = [r["induce"] for r in dropped if r["induce"] is not None]
        raise NoCandidate(
            f"none of {len(records)} candidates is left ({counts or 'none given'}; best induce "
            f"{max(close, default=math.nan):+.2f}). Raise kl_threshold or lower induce_threshold, "
            "check refusal_tokens, or choose the layer by another score"
        )
    kept.sort(key=lambda r: (r["bypass"], r["position"], r["layer"]))
    return SelectionResult(
        position=int(kept[0]["position"]),
        layer=int(kept[0]["layer"]),
        kept=tuple(kept),
        dropped=tuple(dropped),
        records=tuple(records),
        thresholds={
            "kl": kl_threshold,
            "induce": induce_threshold,
            "prune_layers": prune_layers,
        },
    )
