"""A planned edit as a value: which writers change, along which directions, by how much.

Knows updates and module paths. Knows no prompts, no packed storage and no files: the functions that
try, apply, calibrate and write a plan are listed in `conveniences`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from vauban.edits.conveniences import Conveniences
from vauban.edits.update import Update
from vauban.errors import InputError
from vauban.interventions import Add
from vauban.models import residual_writers


@dataclass(frozen=True, eq=False)
class EditPlan(Conveniences):
    """A planned edit. Nothing changes until `apply` or `export`.

    updates     one change per writer
    basis       (k, d) row-orthonormal float32: the directions in the stream
    embedding   "cut" (a matrix of its own), "untie" (cut; the head keeps the old matrix), "tied"
                (the shared matrix is cut, and the head changes with it) or "kept"
    head_path   the module that holds the head, None where it shares the embedding
    settings    what the caller chose, JSON-safe
    notes       what the caller should know about this plan
    model       the model that was planned for, unchanged
    constants   what an affine cut adds to the stream (`affine_cut`)

    >>> import mlx.core as mx, vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> plan = vauban.plan_cut(model, mx.ones(128))
    >>> len(plan.updates), plan.embedding, plan.leakage().worst < 1e-5
    (12, 'kept', True)
    """

    updates: tuple[Update, ...]
    basis: mx.array
    embedding: Literal["cut", "untie", "tied", "kept"]
    head_path: str | None
    settings: Mapping[str, Any]
    notes: tuple[str, ...]
    model: nn.Module
    constants: tuple[Add, ...] = ()

    @property
    def is_whole(self) -> bool:
        """A cut of every writer and table at α 1, which should leave nothing in the stream."""
        every = all(u.complete and u.alpha == 1.0 and not u.bias_left for u in self.updates)
        tables = self.embedding != "kept"
        return every and tables and len(self.updates) == len(residual_writers(self.model))

    def check_modules(self, model: nn.Module, name: str) -> None:
        """InputError where `model` lacks a module of the plan, or has one of another width."""
        writers = {w.path: w for w in residual_writers(model)}
        for update in self.updates:
            width = int(update.basis.shape[1])
            if update.path not in writers:
                raise InputError(
                    f"{name} has no writer {update.path}; this plan was made for another model"
                )
            shape = writers[update.path].shape
            if shape[-1 if update.writes_rows else -2] != width:
                raise InputError(
                    f"{update.path} of {name} has shape {shape}; this plan was made for one whose "
                    f"{'rows' if update.writes_rows else 'outputs'} have {width} coordinates"
                )

    def summary(self) -> str:
        """The plan in a line, and a line per note."""
        kinds = Counter(update.kind for update in self.updates)
        counts = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        head = (
            f"cut of {self.basis.shape[0]} direction(s) from {len(self.updates)} writers "
            f"({counts}), alpha {self.settings['alpha']}, embedding {self.embedding}"
        )
        return "\n".join([head, *(f"note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """Everything but the arrays and the model, JSON-safe."""
        return {
            "settings": dict(self.settings),
            "embedding": self.embedding,
            "directions": int(self.basis.shape[0]),
            "writers": [
                {
                    "path": u.path,
                    "layer": u.layer,
                    "kind": u.kind,
                    "alpha": u.alpha,
                    "complete": u.complete,
                }
                for u in self.updates
            ],
            "notes": list(self.notes),
        }
