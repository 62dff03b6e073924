"""Edit facts into a model, batch after batch, and take them out again.

Keys and values are read from the model as it stands, the residual is spread over the layers
(Meng et al. 2023, algorithm 1), and every batch is written into the ledger. Knows models, rows and
arrays; writes no checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from vauban._arrays import as_numpy
from vauban._common import Progress
from vauban.errors import InputError
from vauban.knowledge.conveniences import Conveniences
from vauban.knowledge.fact_report import FactOutcome, FactReport, LayerOutcome
from vauban.knowledge.facts import Fact, check_batch
from vauban.knowledge.filters import filtered
from vauban.knowledge.key_stats import KeyStats, check_stats, collect_key_stats
from vauban.knowledge.layers import EditedModule, edited_modules
from vauban.knowledge.ledger import EditSettings, Ledger, LedgerBatch
from vauban.knowledge.penalty import Penalty, penalty
from vauban.knowledge.reading import check_written, context_keys, read_facts, read_plain
from vauban.knowledge.tasks import value_tasks
from vauban.knowledge.tokens import (
    Row,
    check_contexts,
    encode_fact,
    sample_contexts,
    target_ids,
)
from vauban.knowledge.tracing import trace_layers
from vauban.knowledge.update_factors import norm_anchored, protected_by, update_factor
from vauban.knowledge.values import Value, ValueSettings, ValueTask, optimise_values
from vauban.knowledge.weights import EditedWeights


@dataclass(frozen=True, eq=False)
class _Solved:
    """One layer of a batch: keys, residual, factor rows."""

    keys: np.ndarray
    residuals: np.ndarray
    rows: np.ndarray


class Editor(Conveniences):
    """Edits facts into `model`, in memory.

    `stats` {block: KeyStats} as `collect_key_stats` returns them; None lets the model write the
    texts for them. `contexts` are templates with one `{}`, the first one "{}"; None samples five
    sentences from the model with `settings.seed`. Weights are kept in float32 over the sequence; a
    packed matrix that is edited becomes a float one in memory (`export` packs it again).

    Raises InputError for statistics of another layer, width or model, and ArchitectureError for
    layers that cannot hold a fact.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> settings = vauban.EditSettings(layers=[1], steps=5)
    >>> editor = vauban.Editor(model, tokenizer, settings, contexts=["{}"])
    >>> report = editor.edit([vauban.Fact("Where is the {} ?", "lamp", "river")])
    >>> len(report.facts)
    1
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        settings: EditSettings | None = None,
        stats: Mapping[int, KeyStats] | None = None,
        *,
        contexts: Sequence[str] | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.settings = settings or EditSettings()
        self.stats = dict(stats) if stats is not None else None
        self.notes: list[str] = []
        self.ledger = Ledger(self.settings)
        self.modules: dict[int, EditedModule] = {}
        self.weights = EditedWeights(model, {})
        self.penalties: dict[int, Penalty] = {}
        """By block what an update pays for; "auto" is a number in its settings."""
        self._anchor: float | None = None
        if contexts is not None:
            self.ledger.contexts = check_contexts(contexts)
        self._sampled = contexts is not None
        if not isinstance(self.settings.layers, str):
            self.prepare(tuple(self.settings.layers))

    def prepare(self, layers: tuple[int, ...], progress: Progress | None = None) -> None:
        """Take up modules, statistics and penalties of the layers; done with the first edit."""
        modules = edited_modules(self.model, layers)
        for module in modules.values():
            check_written(self.model, module)
        if self.stats is None:
            self.stats = collect_key_stats(
                self.model, self.tokenizer, None, layers, seed=self.settings.seed,
                progress=progress,
            )  # fmt: skip
        for layer, module in modules.items():
            stats, digest = check_stats(self.stats, module)
            self.ledger.digests[layer] = digest
            self.penalties[layer] = penalty(stats, **self.settings.of_penalty())
        self.modules, self.weights = modules, EditedWeights(self.model, modules)
        self.ledger.layers = layers

    def edit(
        self,
        facts: Sequence[Fact],
        progress: Progress | None = None,
        *,
        save_to: str | Path | None = None,
    ) -> FactReport:
        """Edit facts in batches of `settings.batch_size`; the weights change in memory.

        `save_to` is a file that gets the ledger after every batch: `restore` takes up from there
        what a run that was ended had edited.

        A fact whose loss does not fall is reported as failed, and the weights do not see it.
        Facts about one subject in a batch share one value. Raises InputError, before anything
        changes, for no facts, contradictory ones, ids that are taken and subjects that cannot be
        told apart.
        """
        facts = self._numbered(facts)
        size = 1 if self.settings.method == "rome" else self.settings.batch_size
        parts = [facts[start : start + size] for start in range(0, len(facts), size)]
        for part in parts:
            check_batch(part)
        self._ready(facts, progress)
        for fact in facts:
            self._rows(fact)
        outcomes: list[FactOutcome] = []
        before = {layer: self.weights.current(layer) for layer in self.modules}
        if self.settings.filter == "prune":
            self.weights.rewind(self.ledger.batches)
        for number, part in enumerate(parts, 1):
            outcomes += self._edit_batch(part)
            if save_to is not None:
                self.ledger.save(save_to)
            if progress:
                progress("edit", number, len(parts))
        return self._report(outcomes, before)

    def _numbered(self, facts: Sequence[Fact]) -> list[Fact]:
        if isinstance(facts, Fact) or not facts:
            raise InputError("no facts to edit; expected a list of at least one Fact")
        taken = {fact.id for fact in self.ledger.facts}
        free = (str(n) for n in range(1, 10**9) if str(n) not in taken)
        used = {fact.id for fact in facts if fact.id is not None}
        listed = []
        for fact in facts:
            if fact.id is None:
                fact = replace(fact, id=next(n for n in free if n not in used))
            elif fact.id in taken:
                raise InputError(f"a fact with the id {fact.id!r} is edited already")
            taken.add(fact.id)
            listed.append(fact)
        return listed

    def _ready(self, facts: Sequence[Fact], progress: Progress | None) -> None:
        if not self._sampled:
            self.ledger.contexts = sample_contexts(self.model, self.tokenizer, self.settings.seed)
            self._sampled = True
        if not self.modules:
            chosen = trace_layers(self.model, self.tokenizer, facts)
            self.notes.append(f"layers {chosen} by causal tracing")
            self.prepare(chosen, progress)

    def _rows(self, fact: Fact) -> list[Row]:
        return [encode_fact(self.tokenizer, fact, context) for context in self.ledger.contexts]

    def _values(self, facts: Sequence[Fact]) -> list[Value]:
        s = self.settings
        tasks = value_tasks(self.model, self.tokenizer, facts, self.ledger.contexts, s.keep)
        chosen = ValueSettings(s.steps, s.lr, s.weight_decay, s.kl_factor, s.clamp, s.stop)
        return optimise_values(self.model, max(self.modules), tasks, chosen)

    def _edit_batch(self, facts: Sequence[Fact]) -> list[FactOutcome]:
        values = self._values(facts)
        kept = [n for n, value in enumerate(values) if not value.failed]
        good = [facts[n] for n in kept]
        z = np.array([values[n].z for n in kept])
        h0 = np.array([values[n].h0 for n in kept])
        if good:
            anchored = self._anchored(good, z, h0) if self.settings.norm_anchor else z
            self._write_batch(good, anchored, h0)
        after = self._probabilities(facts)
        return [
            FactOutcome(
                str(fact.id), fact.text, fact.target_new, value.steps, value.loss,
                float(np.linalg.norm(value.z - value.h0) / np.linalg.norm(value.h0)),
                float(np.exp(-value.nll)), float(p), value.failed, value.before < 5e-2,
            )
            for fact, value, p in zip(facts, values, after, strict=True)
        ]  # fmt: skip

    def _probabilities(self, facts: Sequence[Fact]) -> list[float]:
        """p(target_new) on the plain prompts under the weights as they are."""
        tasks = []
        for n, fact in enumerate(facts):
            target = target_ids(self.tokenizer, fact.text, fact.target_new)
            row = encode_fact(self.tokenizer, fact)
            tasks.append(ValueTask((row,), target, (), n))
        look = ValueSettings(1, 1.0, 0.0, 0.0, 1.0)
        values = optimise_values(self.model, max(self.modules), tasks, look)
        return [float(np.exp(-value.nll)) for value in values]

    def _write_batch(self, facts: Sequence[Fact], z: np.ndarray, h0: np.ndarray) -> None:
        """Spread the residuals over the layers, and write the ledger."""
        rows = [row for fact in facts for row in self._rows(fact)]
        count = len(self.ledger.contexts)
        solved: dict[int, _Solved] = {}
        for number, (layer, module) in enumerate(self.modules.items()):
            keys, plain_keys = self._keys(rows, layer)
            stream, normed = read_plain(self.model, rows[::count], module, max(self.modules) + 1)
            residual = module.residual((z - stream) / (len(self.modules) - number), normed)
            factor = self._factor(keys, plain_keys, layer)
            name = self.settings.filter
            if name not in (None, "prune"):
                weight = self.weights.current(layer).astype(np.float32)
                basis = protected_by(self.settings, self.penalties[layer])
                residual, factor = filtered(name, residual, factor, weight, basis)
            solved[layer] = _Solved(keys, residual, factor)
            self.weights.add(layer, residual.T @ factor)
        after, _ = read_facts(self.model, rows, list(self.modules.values()))
        self.ledger.batches.append(
            LedgerBatch(
                tuple(facts), z, h0,
                {layer: s.keys for layer, s in solved.items()},
                context_keys(after, count, plain_half=self.settings.method != "rome"),
                {layer: s.residuals for layer, s in solved.items()},
                {layer: s.rows for layer, s in solved.items()},
            )
        )  # fmt: skip

    def _keys(self, rows: Sequence[Row], layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys of the facts, and those of their plain prompts, as of now."""
        count = len(self.ledger.contexts)
        keys, _ = read_facts(self.model, rows, [self.modules[layer]])
        joined = context_keys(keys, count, plain_half=self.settings.method != "rome")
        return joined[layer], keys[layer][::count]

    def _factor(self, keys: np.ndarray, plain: np.ndarray, layer: int) -> np.ndarray:
        """B (u, d0) with the keys of earlier edits, where the method keeps them."""
        past = [batch.kept[layer] for batch in self.ledger.batches]
        history = np.concatenate(past) if past and self.settings.keeps_history else None
        return update_factor(self.settings.method, self.penalties[layer], keys, plain, history)

    def _anchored(self, facts: Sequence[Fact], z: np.ndarray, h0: np.ndarray) -> np.ndarray:
        """The values with the usual length of what the MLP writes, that of the first batch."""
        last = max(self.modules)
        rows = [encode_fact(self.tokenizer, fact) for fact in facts]
        keys, _ = read_facts(self.model, rows, [self.modules[last]])
        _, normed = read_plain(self.model, rows, self.modules[last], last + 1)
        before = self.modules[last].written(keys[last] @ self.weights.current(last).T, normed)
        anchored, self._anchor = norm_anchored(z, h0, before, self._anchor)
        return anchored

    def undo(self, ids: str | Sequence[str], *, values: str = "again") -> FactReport:
        """Take facts out: the weights are as if those had never been edited.

        What was edited before their batch stays; their batch and all later ones are solved again.
        `values` "again" trains the values of later batches anew, as they would have been without
        the facts; "kept" takes them from the ledger, which is faster and differs by how far the
        facts had moved them. Values of the same batch never depended on one another (but for facts
        about one subject, which are trained again).

        Raises InputError for an id that is not in the ledger.
        """
        wanted = {ids} if isinstance(ids, str) else set(ids)
        missing = sorted(wanted - {fact.id for fact in self.ledger.facts if fact.id})
        if missing:
            raise InputError(f"no fact with the id {missing[0]!r} is in the ledger")
        if values not in ("again", "kept"):
            raise InputError(f"values is {values!r}; expected 'again' or 'kept'")
        before = {layer: self.weights.current(layer) for layer in self.modules}
        batches = self.ledger.batches
        first = next(n for n, batch in enumerate(batches) if wanted & set(batch.ids))
        later, self.ledger.batches = batches[first:], batches[:first]
        self.weights.rewind(self.ledger.batches)
        outcomes: list[FactOutcome] = []
        for number, batch in enumerate(later):
            removed = {f.subject for f in batch.facts if f.id in wanted}
            keep = [n for n, fact in enumerate(batch.facts) if fact.id not in wanted]
            facts = [batch.facts[n] for n in keep]
            shared = any(fact.subject in removed for fact in facts)
            if not facts:
                continue
            if shared or (number and values == "again"):
                outcomes += self._edit_batch(facts)
            else:
                self._write_batch(facts, batch.values[keep], batch.plain[keep])
        return self._report(outcomes, before)

    def restore(self, ledger: Ledger) -> None:
        """Take up a ledger on the model it was made for: its edits are in the weights afterwards.

        Raises InputError where this editor has edits already, or for another model's ledger.
        """
        if self.ledger.batches:
            raise InputError("this editor has edits already; restore a ledger into a fresh one")
        self.ledger.contexts, self._sampled = ledger.contexts, True
        if not self.modules:
            self.prepare(ledger.layers)
        if self.ledger.digests != ledger.digests:
            raise InputError("the ledger belongs to another model or layers; use replay")
        self.ledger.batches = list(ledger.batches)
        self.weights.rewind(self.ledger.batches)
        self.weights.settle(self.settings.filter)

    def replay(self, ledger: Ledger) -> FactReport:
        """Edit a ledger's facts into this model, in the same batches and contexts."""
        self.ledger.contexts, self._sampled = ledger.contexts, True
        if not self.modules:
            self.prepare(ledger.layers)
        before = {layer: self.weights.current(layer) for layer in self.modules}
        outcomes: list[FactOutcome] = []
        for batch in ledger.batches:
            outcomes += self._edit_batch(self._numbered(batch.facts))
        return self._report(outcomes, before)

    def _report(
        self, outcomes: Sequence[FactOutcome], before: Mapping[int, np.ndarray]
    ) -> FactReport:
        self.weights.settle(self.settings.filter)
        layers = []
        for layer in self.modules:
            delta = self.weights.current(layer) - before[layer]
            size = float(np.linalg.norm(delta))
            moment = as_numpy(self.penalties[layer].moment).astype(np.float64)
            leak = float(np.sqrt(max(0.0, np.einsum("ij,ij->", delta @ moment, delta))))
            base = float(np.linalg.norm(before[layer]))
            layers.append(LayerOutcome(layer, size / base, leak / size if size else 0.0))
        rules = tuple(rule.summary() for rule in self.penalties.values())
        return FactReport(tuple(outcomes), tuple(layers), rules, tuple(self.notes))
