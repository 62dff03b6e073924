"""Causal selection: what each candidate direction does to the model's first answer token.

Arditi et al. 2024 (arXiv 2406.11717), appendix C, and the local and addition forms of it. Runs the
model through `PromptReader`; the rule itself is `select_from_scores`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban._common import RELATIVE_NOISE, Progress, largest
from vauban.directions.candidates import Key, candidate_table
from vauban.directions.refusal_odds import (
    check_mass,
    last_token_kl,
    refusal_log_odds,
    refusal_mass,
    refusal_token_ids,
)
from vauban.directions.selection_rule import (
    NoCandidate,
    SelectionResult,
    drop_reason,
    layer_limit,
    select_from_scores,
)
from vauban.errors import InputError, VaubanWarning
from vauban.generation import PromptReader, SharedPrefix
from vauban.interventions import Ablate, Add, Intervention, Project
from vauban.models import anatomy
from vauban.prompts import encode_chat

Kind = Literal["ablate", "project", "add"]
# In this order, a candidate that is out is not measured further, and KL and bypass, which come
# after one another, read the shared prefix under the same change.
_STAGES = ("induce", "kl", "bypass")


def select_direction(
    model: nn.Module,
    tokenizer: Any,
    candidates: Any,
    harmful: Sequence[Any],
    harmless: Sequence[Any],
    *,
    kind: Kind = "ablate",
    scope: Literal["all", "local"] = "all",
    scores: Literal["all", "needed"] = "all",
    kl_threshold: float | None = 0.1,
    induce_threshold: float | None = 0.0,
    prune_layers: float = 0.2,
    refusal_tokens: Sequence[int] | None = None,
    multipliers: Sequence[float] = (1.0,),
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> SelectionResult:
    """The candidate that turns refusal off best, on and off again, at little cost elsewhere.

    `candidates`: `collect_candidates`' result, a `DirectionResult`, or {(position, residual):
    raw vector (d,)}; for "project" a basis (k, d) whose first row has the raw length. `harmful`
    and `harmless` are validation prompts, not those of the estimate. For each candidate

    bypass  mean refusal log-odds on `harmful` under the removal: "ablate" (all three sites),
            "project" (P, once per stream) or "add" (-1 times the vector at its residual)
    kl      mean KL(unchanged || removal) of the last token on `harmless`
    induce  mean log-odds on `harmless` with the raw vector added at its residual; the largest over
            `multipliers`

    `scope` "all" removes at every block, "local" at the candidate's own (an addition always is).
    `scores="needed"` measures induce first, KL where that survives, then bypass where both do; the
    choice is the same. Residuals before a change are not computed again, and the prefix that all
    prompts of both sets share is read once per change. `refusal_tokens`: by default
    `refusal_token_ids`.

    Raises InputError for empty prompts, unknown options and candidates of the wrong size,
    NoCandidate when none passes. Warns when the refusal tokens carry no mass on `harmful`.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> bad, good = ["Explain how to rob a shop.", "How can I forge a ticket?"], ["Name a colour."]
    >>> offered = vauban.collect_candidates(model, tokenizer, bad, good)
    >>> found = vauban.select_direction(
    ...     model, tokenizer, offered, bad, good, induce_threshold=None, kl_threshold=None)
    >>> 0 <= found.layer < len(model.layers)
    True
    """
    _check_options(kind, scope, scores, harmful, harmless, multipliers)
    parts = anatomy(model)
    limit = layer_limit(parts.n_layers, prune_layers)
    table = candidate_table(candidates)
    _check_table(table, parts.n_layers, parts.d_model)
    ids = _token_ids(tokenizer, refusal_tokens, parts.vocabulary)
    local = scope == "local" or kind == "add"
    scorer = _Scorer(
        *_readers(model, tokenizer, harmful, harmless, record_all=local, batch_size=batch_size),
        ids, kind, local, tuple(multipliers),
    )  # fmt: skip
    base = {
        "harmful": _mean(refusal_log_odds(scorer.harmful.baseline, ids)),
        "harmless": _mean(refusal_log_odds(scorer.harmless.baseline, ids)),
    }
    mass = refusal_mass(scorer.harmful.baseline, ids)
    notes = [check_mass(mass, scorer.harmful.baseline, ids, tokenizer)]
    if not base["harmful"] > base["harmless"]:
        notes.append(
            f"refusal is no likelier on the harmful prompts ({base['harmful']:+.2f}) than on the "
            f"harmless ones ({base['harmless']:+.2f}): are the sets in order?"
        )
        warnings.warn(notes[-1], VaubanWarning, stacklevel=2)
    noise = _noise_level(candidates, table, scorer.harmless)
    records = []
    for number, ((key, vector), is_noise) in enumerate(zip(table.items(), noise, strict=True)):
        record: dict[str, Any] = {"position": key[0], "layer": key[1]}
        record |= dict.fromkeys(_STAGES)
        if is_noise:
            # A zero difference has no direction to remove: not even "all" can score it.
            record["reason"] = "difference is zero up to rounding"
        for stage, name in enumerate(_STAGES):
            dropped = drop_reason(record, limit, kl_threshold, induce_threshold)
            if not is_noise and not (scores == "needed" and dropped):
                record[name] = getattr(scorer, name)(key, vector)
            if progress:
                progress("select", len(_STAGES) * number + stage + 1, len(_STAGES) * len(table))
        records.append(record)
    chosen = select_from_scores(
        records, parts.n_layers, kl_threshold=kl_threshold,
        induce_threshold=induce_threshold, prune_layers=prune_layers,
    )  # fmt: skip
    return replace(
        chosen,
        direction=table[chosen.position, chosen.layer],
        kind=kind,
        scope="local" if local else "all",
        refusal_tokens=ids,
        baseline=base,
        mass=_mean(mass),
        warnings=tuple(note for note in notes if note),
    )


@dataclass(frozen=True, eq=False)
class _Scorer:
    """The three scores of a candidate, each a pass over the prompts of one set."""

    harmful: PromptReader
    harmless: PromptReader
    refusal_ids: tuple[int, ...]
    kind: Kind
    local: bool
    multipliers: tuple[float, ...]

    def induce(self, key: Key, vector: mx.array) -> float:
        """Mean refusal log-odds on harmless prompts with the raw vector added; the largest one."""
        raw = vector if vector.ndim == 1 else vector[0]
        added = (
            self.harmless.logits([Add(raw, factor, key[1])], key[1]) for factor in self.multipliers
        )
        return largest(_mean(refusal_log_odds(logits, self.refusal_ids)) for logits in added)

    def kl(self, key: Key, vector: mx.array) -> float:
        """Mean KL(unchanged || removal) of the last token on harmless prompts."""
        changed = self.harmless.logits(*self._removal(key, vector))
        return _mean(last_token_kl(self.harmless.baseline, changed))

    def bypass(self, key: Key, vector: mx.array) -> float:
        """Mean refusal log-odds on harmful prompts under the removal."""
        changed = self.harmful.logits(*self._removal(key, vector))
        return _mean(refusal_log_odds(changed, self.refusal_ids))

    def _removal(self, key: Key, vector: mx.array) -> tuple[list[Intervention], int]:
        """The removing intervention, and the first block that it touches."""
        at: Any = [key[1]] if self.local else "all"
        if self.kind == "add":
            return [Add(vector, -1.0, key[1])], key[1]
        change = Ablate(vector, at) if self.kind == "ablate" else Project(vector, 1.0, at)
        return [change], key[1] if self.local else 0


def _readers(
    model: nn.Module, tokenizer: Any, harmful: Sequence[Any], harmless: Sequence[Any], *,
    record_all: bool, batch_size: int | None,
) -> tuple[PromptReader, PromptReader]:  # fmt: skip
    """Readers of the two sets, which share the prefix that all prompts begin with."""
    encoded = [[encode_chat(tokenizer, p) for p in prompts] for prompts in (harmful, harmless)]
    prefix = SharedPrefix(model, [*encoded[0], *encoded[1]], record=True)
    first, second = (
        PromptReader(model, lists, record=record, batch_size=batch_size, prefix=prefix)
        for lists, record in zip(encoded, (record_all, True), strict=True)
    )
    return first, second


def choose_causally(
    model: nn.Module,
    tokenizer: Any,
    candidates: dict[Key, mx.array],
    harmful: Sequence[Any],
    harmless: Sequence[Any],
    fallback: Key,
    **options: Any,
) -> tuple[Key, SelectionResult | None, list[str]]:
    """(position, residual) by `select_direction` with the scores that are needed.

    Where no candidate passes, `induce_threshold` is taken away, then `kl_threshold`, and a note
    names the threshold that the chosen one would have passed. `fallback` is for the rest: no
    candidate is given, none is finite or above noise, or no word of refusal is one token of the
    tokenizer. A note says so.
    """
    if not candidates:
        return fallback, None, ["there is one residual to choose from, so nothing was compared"]
    if options.get("refusal_tokens") is None:
        try:
            options["refusal_tokens"] = refusal_token_ids(tokenizer)
        except InputError as error:
            return fallback, None, [f"the layer is chosen by separation, because {error}"]
    notes: list[str] = []
    # Filters bend before they forbid: induce first, which says whether adding the direction brings
    # refusal about, then KL.
    for relaxed in ((), ("induce_threshold",), ("induce_threshold", "kl_threshold")):
        try:
            found = select_direction(
                model, tokenizer, candidates, harmful, harmless,
                **{"scores": "needed", **options, **dict.fromkeys(relaxed)},
            )  # fmt: skip
        except NoCandidate as error:
            failure = error
            continue
        if relaxed:
            best = found.kept[0]
            given = {"induce_threshold": 0.0, "kl_threshold": 0.1, **options}
            notes = [
                f"no candidate passes {name} {given[name]:g}: the chosen one would need "
                f"{best[name.removesuffix('_threshold')]:.4g}"
                for name in relaxed
            ]
        return (found.position, found.layer), found, [*notes, *found.warnings]
    note = f"causal selection failed, the layer is chosen by separation instead: {failure}"
    return fallback, None, [note]


def _mean(values: np.ndarray) -> float:
    return float(values.mean())


def _check_options(
    kind: str, scope: str, scores: str, harmful: Sequence[Any], harmless: Sequence[Any],
    multipliers: Sequence[float],
) -> None:  # fmt: skip
    options = {
        "kind": (kind, ("ablate", "project", "add")),
        "scope": (scope, ("all", "local")),
        "scores": (scores, ("all", "needed")),
    }
    for name, (value, allowed) in options.items():
        if value not in allowed:
            raise InputError(f"{name} is {value!r}; expected one of {allowed}")
    for name, prompts in (("harmful", harmful), ("harmless", harmless)):
        if not len(prompts):
            raise InputError(f"the {name} validation set is empty; expected at least one prompt")
    if not len(multipliers):
        raise InputError("multipliers is empty; expected at least one factor, for example (1.0,)")


def _check_table(table: dict[Key, mx.array], n_layers: int, d_model: int) -> None:
    for (position, residual), vector in table.items():
        if not 0 <= residual < n_layers:
            raise InputError(
                f"candidate at position {position}, residual {residual}: expected a block input, "
                f"0 to {n_layers - 1}"
            )
        if vector.ndim not in (1, 2) or vector.shape[-1] != d_model:
            raise InputError(
                f"candidate at position {position}, residual {residual} has shape {vector.shape}; "
                f"expected ({d_model},) or (k, {d_model})"
            )
        if not bool(mx.isfinite(vector).all()):
            raise InputError(f"candidate at position {position}, residual {residual} holds NaN")


def _token_ids(
    tokenizer: Any, refusal_tokens: Sequence[int] | None, vocabulary: int
) -> tuple[int, ...]:
    if refusal_tokens is None:
        return refusal_token_ids(tokenizer)
    ids = tuple(int(t) for t in refusal_tokens)
    if not ids or min(ids) < 0 or max(ids) >= vocabulary:
        raise InputError(f"refusal_tokens are {ids}; expected ids from 0 to {vocabulary - 1}")
    return ids


def _noise_level(candidates: Any, table: dict[Key, mx.array], reader: PromptReader) -> list[bool]:
    """Whether each candidate is zero against the norm of the residual that it comes from.

    At a template's tokens the class means of early residuals agree up to rounding; normalised,
    such a difference would be a random direction, and an exact zero none at all.
    """
    scales: dict[Key, float] = {}
    if hasattr(candidates, "scales"):
        for column, position in enumerate(candidates.positions):
            for residual in range(candidates.vectors.shape[0]):
                scales[position, residual] = float(candidates.scales[residual, column])
    elif reader.residual is not None:
        norms = mx.linalg.norm(reader.residual, axis=-1).mean(axis=0)
        scales = {key: float(norms[key[1]]) for key in table}
    return [
        float(mx.linalg.norm(vector if vector.ndim == 1 else vector[0]))
        <= max(RELATIVE_NOISE * scales.get(key, 0.0), 1e-12)
        for key, vector in table.items()
    ]
