"""Gather the inputs of the very matrices that will be edited, with bounded memory.

Weights act at every token, so every position of the preservation prompts counts. Knows prompts,
models and the accumulators of `null_space`; edits nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from vauban._arrays import integers
from vauban.edits.null_space import KeyAccumulator, Keys, NullSpace, null_space
from vauban.edits.update import Protection
from vauban.errors import InputError
from vauban.models import Writer, batches, forward, residual_writers, verify_forward
from vauban.models.inputs import module_inputs
from vauban.prompts import encode_chat

Progress = Callable[[str, int, int], None]
# An input this many times as long as the median one is an attention sink or a massive activation.
_SINK = 10.0


@dataclass(frozen=True, eq=False)
class PreservationKeys:
    """Per writer path the keys of the matrix, or of each expert (None: never routed to)."""

    keys: Mapping[str, tuple[Keys | None, ...]]
    n_prompts: int
    n_tokens: int

    def spaces(self, path: str, **options: Any) -> tuple[NullSpace | None, ...]:
        """`null_space(keys, **options)` of a writer, one per expert where it has experts."""
        if path not in self.keys:
            raise InputError(f"no keys were collected for {path}; collect them for this writer")
        return tuple(None if k is None else null_space(k, **options) for k in self.keys[path])

    def summary(self) -> str:
        return (
            f"keys of {len(self.keys)} writers from {self.n_prompts} prompts, "
            f"{self.n_tokens} tokens"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "writers": len(self.keys),
            "prompts": self.n_prompts,
            "tokens": self.n_tokens,
        }


@dataclass(frozen=True, eq=False)
class Preserve:
    """What `plan_cut(preserve=...)` takes: keys, how much of them, and how to cut around them.

    `energy` or `rank` as in `null_space`; mode "project" or "least_squares", which needs
    `targets`: keys of prompts that carry the direction.
    """

    keys: PreservationKeys
    energy: float | None = None
    rank: int | None = None
    mode: Literal["project", "least_squares"] = "project"
    targets: PreservationKeys | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("project", "least_squares"):
            raise InputError(f"mode is {self.mode!r}; expected 'project' or 'least_squares'")
        if self.mode == "least_squares" and self.targets is None:
            raise InputError("mode 'least_squares' needs targets: keys of prompts to act on")

    def protection(self, path: str) -> Protection:
        """The `Protection` of one writer."""
        spaces = self.keys.spaces(path, energy=self.energy, rank=self.rank)
        targets: tuple[mx.array | None, ...] = ()
        if self.targets is not None:
            found = self.targets.keys.get(path, (None,) * len(spaces))
            targets = tuple(None if k is None else k.factor for k in found)
        return Protection(spaces, self.mode, targets)


def collect_preservation_keys(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Any],
    writers: Iterable[Writer | str] | None = None,
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> PreservationKeys:
    """The inputs of each writer's matrix at every token of `prompts`, as triangular factors.

    `writers` (default: all but the tables) names the matrices. Attention sinks (the first token,
    and rows ten times as long as the median) are kept as rows but do not count as energy.
    Raises InputError for no prompts, or a path the model does not have.
    """
    if not prompts:
        raise InputError("no preservation prompts; expected at least one")
    known = {w.path: w for w in residual_writers(model) if w.layer >= 0}
    paths = [w if isinstance(w, str) else w.path for w in writers or known.values()]
    unknown = [p for p in paths if p not in known]
    if unknown:
        raise InputError(f"{unknown[0]} is no residual writer with inputs")
    collected: dict[str, dict[int, KeyAccumulator]] = {p: {} for p in paths}
    starts: list[bool] = []

    def read(path: str, rows: mx.array, experts: mx.array | None) -> None:
        size = mx.linalg.norm(rows.astype(mx.float32), axis=-1)
        counted = size <= _SINK * mx.median(size)
        if experts is None:
            counted = counted & mx.logical_not(mx.array(starts))
            _at(collected[path], 0, rows).update(rows, counted)
            return
        routed = integers(experts)
        for expert in sorted(set(routed)):
            chosen = mx.array([i for i, e in enumerate(routed) if e == expert])
            _at(collected[path], expert, rows).update(rows[chosen], counted[chosen])

    # Before anything is read: the check itself runs the model.
    verify_forward(model)
    tokens = [encode_chat(tokenizer, prompt) for prompt in prompts]
    done = total = 0
    with module_inputs(model, paths, read):
        # Equal lengths: a padded position is no input that anything has to preserve.
        for batch in batches(tokens, batch_size=batch_size, equal_lengths=True):
            starts = [t == 0 for _ in batch.rows for t in range(batch.lengths[0])]
            out = forward(model, batch.tokens, positions="last", logits=False)
            mx.eval(out.residual)
            total += int(batch.tokens.size)
            done += len(batch.rows)
            if progress:
                progress("collect keys", done, len(tokens))
    return PreservationKeys(
        {p: _per_expert(collected[p], known[p]) for p in paths}, len(tokens), total
    )


def _at(found: dict[int, KeyAccumulator], expert: int, rows: mx.array) -> KeyAccumulator:
    if expert not in found:
        found[expert] = KeyAccumulator(int(rows.shape[-1]))
    return found[expert]


def _per_expert(found: dict[int, KeyAccumulator], writer: Writer) -> tuple[Keys | None, ...]:
    count = writer.shape[0] if len(writer.shape) == 3 else 1
    return tuple(found[e].keys() if e in found else None for e in range(count))
