"""What null-space protection let through of a planned cut, and what it kept, matrix by matrix.

Knows plans, keys and weights; decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from vauban._common import largest
from vauban.edits.modules import module_weight
from vauban.edits.null_space import mean_leak, removable_share
from vauban.edits.plan import EditPlan
from vauban.edits.preservation_keys import PreservationKeys
from vauban.errors import InputError


@dataclass(frozen=True)
class WriterProtection:
    """One matrix, its experts together.

    `rank` of `width` input directions are preserved (of experts: on average); `leak` is what the
    keys still lose, root mean square over their tokens, in units of what a plain cut takes from
    them; `removable` is ‖taken‖²/‖removed‖² of the cut itself, above 1 where least squares takes
    out more.
    """

    rank: float
    width: int
    leak: float
    removable: float


@dataclass(frozen=True)
class ProtectionReport:
    """`writers` {path: `WriterProtection`} of a protected plan, on `n_prompts` prompts."""

    writers: Mapping[str, WriterProtection]
    n_prompts: int
    n_tokens: int

    @property
    def worst_leak(self) -> float:
        return largest(w.leak for w in self.writers.values())

    @property
    def mean_removable(self) -> float:
        return sum(w.removable for w in self.writers.values()) / len(self.writers)

    def summary(self) -> str:
        width = max(map(len, self.writers))
        lines = [
            f"protection of {len(self.writers)} writers on {self.n_prompts} prompts "
            f"({self.n_tokens} tokens): leak at most {self.worst_leak:.1e}, "
            f"{self.mean_removable:.0%} of the cut made",
            f"{'writer':{width}}  preserved    leak  of the cut",
        ]
        for path, w in self.writers.items():
            preserved = f"{w.rank:.0f}/{w.width}"
            lines.append(f"{path:{width}}  {preserved:>9}  {w.leak:.0e}  {w.removable:10.1%}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompts": self.n_prompts,
            "tokens": self.n_tokens,
            "worst_leak": self.worst_leak,
            "mean_removable": self.mean_removable,
            "writers": {path: asdict(w) for path, w in self.writers.items()},
        }


def protection_report(plan: EditPlan, keys: PreservationKeys) -> ProtectionReport:
    """Leak on the prompts of `keys`, and removable share, of every protected writer of `plan`.

    `keys` are those that the plan preserves, or keys of other prompts, to see what the protection
    is worth there. Computed in float32 from the planned matrices, one at a time.

    Raises InputError for a plan without `preserve`, and for a writer without keys.

    >>> import mlx.core as mx, vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> keys = vauban.collect_preservation_keys(model, tokenizer, ["Say hello."])
    >>> plan = vauban.plan_cut(model, mx.ones(128), preserve=vauban.Preserve(keys, energy=1.0))
    >>> protection_report(plan, keys).worst_leak < 1e-4
    True
    """
    protected = [u for u in plan.updates if u.protection is not None]
    if not protected:
        raise InputError("the plan protects nothing; expected one of plan_cut(..., preserve=...)")
    missing = [u.path for u in protected if u.path not in keys.keys]
    if missing:
        raise InputError(f"no keys were collected for {missing[0]}; collect them for this writer")
    modules = dict(plan.model.named_modules())
    protections = {}
    for update in protected:
        assert update.protection is not None
        weight = module_weight(modules[update.path])
        removed, taken = update.removed(weight), update.taken(weight)
        spaces = update.protection.spaces
        protections[update.path] = WriterProtection(
            sum(0 if s is None else s.rank for s in spaces) / len(spaces),
            int(removed.shape[-1]),
            mean_leak(_each(removed), _each(taken), keys.keys[update.path]),
            removable_share(removed, taken),
        )
    return ProtectionReport(protections, keys.n_prompts, keys.n_tokens)


def _each(rows: mx.array) -> list[mx.array]:
    """(k, in) of the matrix, or of each expert."""
    return [rows] if rows.ndim == 2 else list(rows)
