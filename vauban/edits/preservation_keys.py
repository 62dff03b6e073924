"""Gather the inputs of the very matrices that will be edited, with bounded memory.

Weights act at every token, so every position of the preservation prompts counts. Knows prompts,
models and the accumulators of `null_space`; edits nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from vauban._arrays import integers
from vauban._common import Progress
from vauban.edits.null_space import (
    DEFAULT_LIMIT,
    KeyAccumulator,
    Keys,
    NullSpace,
    null_space,
)
from vauban.edits.options import finite
from vauban.edits.update import Protection
from vauban.errors import InputError
from vauban.generation import Batches
from vauban.models import Writer, can_share, forward, module_inputs, residual_writers
from vauban.prompts import encode_chat

# An input this many times as long as the median one is an attention sink or a massive activation.
_SINK = 10.0


@dataclass(frozen=True, eq=False)
class PreservationKeys:
    """Per writer path the keys of the matrix, or of each expert (None: never routed to).

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> path = "model.layers.0.mlp.down_proj"
    >>> found = vauban.collect_preservation_keys(model, tokenizer, ["Say hello."], [path])
    >>> list(found.keys) == [path], found.keys[path][0].rows == found.n_tokens
    (True, True)
    """

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
    `targets`: keys of prompts that carry the direction. A fitted row is at most `limit` times as
    long as the one that a plain cut removes. `protection_report` says what became of the cut.

    >>> import mlx.core as mx, vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> keys = vauban.collect_preservation_keys(model, tokenizer, ["Say hello."])
    >>> plan = vauban.plan_cut(model, mx.ones(128), preserve=Preserve(keys, rank=1))
    >>> 0.0 < vauban.protection_report(plan, keys).mean_removable < 1.0
    True
    """

    keys: PreservationKeys
    energy: float | None = None
    rank: int | None = None
    mode: Literal["project", "least_squares"] = "project"
    targets: PreservationKeys | None = None
    limit: float = DEFAULT_LIMIT

    def __post_init__(self) -> None:
        for name, given in (("keys", self.keys), ("targets", self.targets)):
            if not isinstance(given, PreservationKeys) and (given is not None or name == "keys"):
                raise InputError(
                    f"{name} is a {type(given).__name__}; expected the PreservationKeys that "
                    "collect_preservation_keys returns"
                )
        if finite(self.limit, "limit") <= 0:
            raise InputError(f"limit is {self.limit}; expected more than 0 (1 is a plain cut's)")
        if self.mode not in ("project", "least_squares"):
            raise InputError(f"mode is {self.mode!r}; expected 'project' or 'least_squares'")
        if self.mode == "least_squares" and self.targets is None:
            raise InputError("mode 'least_squares' needs targets: keys of prompts to act on")

    def protection(self, path: str) -> Protection:
        """The `Protection` of one writer."""
        spaces = self.keys.spaces(path, energy=self.energy, rank=self.rank)
        targets: tuple[mx.array | None, ...] = ()
        if self.targets is not None:
            target_keys = self.targets.keys.get(path, (None,) * len(spaces))
            targets = tuple(None if k is None else k.factor for k in target_keys)
        return Protection(spaces, self.mode, targets, float(self.limit))


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
    and rows ten times as long as the median) are kept as rows but do not count as energy. The first
    token is read on its own and the rest from the cache behind it, so that an expert's rows need
    not say which token they came from; where a model cannot go on from a cache, it is told by its
    place, which routed rows do not have.
    Raises InputError for no prompts, or a path the model does not have.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> found = collect_preservation_keys(model, tokenizer, ["Say hello.", "Name a colour."])
    >>> found.n_prompts, len(found.keys)
    (2, 12)
    """
    if not prompts:
        raise InputError("no preservation prompts; expected at least one")
    known = {w.path: w for w in residual_writers(model) if w.layer >= 0}
    paths = [w if isinstance(w, str) else w.path for w in writers or known.values()]
    unknown = [p for p in paths if p not in known]
    if unknown:
        raise InputError(f"{unknown[0]} is no residual writer with inputs")
    # Before anything is read: trying it runs the model.
    split = can_share(model)
    tokens = [encode_chat(tokenizer, prompt) for prompt in prompts]
    done = total = 0
    rows = _Rows(known)
    with module_inputs(model, paths, rows.read):
        # Equal lengths: a padded position is no input that anything has to preserve.
        for batch in Batches(tokens, batch_size=batch_size, equal_lengths=True):
            cache = make_prompt_cache(model)
            width = batch.lengths[0]
            for part in (slice(0, 1), slice(1, width)) if split else (slice(0, width),):
                if part.start == width:
                    continue
                rows.first = [t == 0 for _ in batch.rows for t in range(width)[part]]
                out = forward(
                    model, batch.tokens[:, part], cache=cache, positions="last", logits=False
                )
                mx.eval(out.residual)
                rows.take()
            total += int(batch.tokens.size)
            done += len(batch.rows)
            if progress:
                progress("collect keys", done, len(tokens))
    return PreservationKeys({p: rows.keys(known[p]) for p in paths}, len(tokens), total)


class _Rows:
    """What the writers of a block read, held until all of it is there, then taken into account.

    Experts that are modules of their own (DBRX) read one token at a time: that an input is long
    shows only beside those of the block's other experts.
    """

    def __init__(self, writers: Mapping[str, Writer]) -> None:
        self.first: list[bool] = []
        """For every token of the pass whether it is a prompt's first."""
        self._writers = writers
        self._found: dict[tuple[str, int], KeyAccumulator] = {}
        self._held: dict[tuple[str, str], list[tuple[str, mx.array, mx.array | None]]] = {}
        self._layer = -1

    def read(self, path: str, rows: mx.array, experts: mx.array | None) -> None:
        writer = self._writers[path]
        if writer.layer != self._layer:
            self.take()
            self._layer = writer.layer
        alike = writer.kind, path.rpartition(".")[2]
        self._held.setdefault(alike, []).append((path, rows, experts))

    def take(self) -> None:
        """Accumulate what is held, per matrix."""
        for readings in self._held.values():
            rows = mx.concatenate([r for _, r, _ in readings])
            size = mx.linalg.norm(rows.astype(mx.float32), axis=-1)
            first = [mark for _, r, e in readings for mark in self._firsts(len(r), e is not None)]
            counted = (size <= _SINK * mx.median(size)) & mx.logical_not(mx.array(first))
            of: dict[tuple[str, int], list[int]] = {}
            index = 0
            for path, matrix_rows, experts in readings:
                for expert in [0] * len(matrix_rows) if experts is None else integers(experts):
                    of.setdefault((path, expert), []).append(index)
                    index += 1
            for matrix, indices in of.items():
                if matrix not in self._found:
                    self._found[matrix] = KeyAccumulator(int(rows.shape[-1]))
                chosen = mx.array(indices)
                self._found[matrix].update(rows[chosen], counted[chosen])
        self._held.clear()

    def _firsts(self, rows: int, routed: bool) -> list[bool]:
        if len(set(self.first)) == 1:
            return self.first[:1] * rows
        return self.first if rows == len(self.first) and not routed else [False] * rows

    def keys(self, writer: Writer) -> tuple[Keys | None, ...]:
        """The keys of a writer's matrix, or of each of its experts (None: never routed to)."""
        count = writer.shape[0] if len(writer.shape) == 3 else 1
        accumulators = (self._found.get((writer.path, expert)) for expert in range(count))
        return tuple(None if a is None else a.keys() for a in accumulators)
