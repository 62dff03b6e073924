"""The second moment of the keys of a layer: streamed over texts, saved, resumed.

A key is what the MLP's last matrix reads at one token. Knows models and raw texts; edits nothing.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban._arrays import load_arrays, save_arrays
from vauban._common import Progress, probe_tokens
from vauban.errors import InputError, ModelError, shown
from vauban.generation import Batches, eos_ids, generate_tokens, token_budget
from vauban.knowledge.layers import EditedModule, edited_modules
from vauban.linalg import as_array
from vauban.models import anatomy, can_pad, forward, module_inputs, verify_forward

# A text is cut after so many tokens, as in Meng et al.
LONGEST = 4096
# How many tokens a model writes where no texts are given, as a multiple of the keys' width, the
# multiple that very wide keys get, and from where on; how long one of its texts is. Between 1.6 and
# 39 tokens a direction an edit met its facts alike (SmolLM2-135M); Fast MEMIT (arXiv 2506.04226)
# needs 2 to 10.
_WRITTEN, _WIDE, _MANY, _TEXT = 4, 2, 16384, 64
_SAVE_EVERY = 20
# Texts that are written at once, and tokens of each that are timed before.
_ROWS, _PROBED = 64, 3


@dataclass(frozen=True, eq=False)
class KeyStats:
    """`moment` (d0, d0) float32, the mean of k kᵀ over `count` tokens at block `layer`.

    `corpus` and `model` are hashes of the texts' tokens and of the layer's matrix, "" for a moment
    that was given.

    >>> import mlx.core as mx
    >>> stats = KeyStats.from_moment(mx.eye(3), count=10, layer=2)
    >>> stats.moment.shape, stats.count, stats.layer
    ((3, 3), 10, 2)
    """

    moment: mx.array = field(repr=False)
    count: int
    layer: int
    corpus: str = ""
    model: str = ""

    @classmethod
    def from_moment(cls, moment: Any, count: int, layer: int) -> KeyStats:
        """Statistics from a moment that is known; InputError for one that cannot be a moment."""
        c = as_array(moment, "moment").astype(mx.float32)
        if c.ndim != 2 or c.shape[0] != c.shape[1]:
            raise InputError(f"the moment has shape {c.shape}; expected (d0, d0)")
        if count < 1:
            raise InputError(f"count is {count}; expected at least 1 token")
        if not bool(mx.isfinite(c).all()):
            raise InputError("the moment holds NaN or inf")
        if float(mx.abs(c - c.T).max()) > 1e-3 * float(mx.abs(c).max()) + 1e-30:
            raise InputError("the moment is not symmetric; expected the mean of k kᵀ")
        return cls(c, int(count), int(layer))

    def save(self, path: str | Path) -> Path:
        """Write one file of safetensors bytes; its name should end in `.vauban`."""
        path = Path(path).expanduser()
        facts = {"count": self.count, "layer": self.layer}
        hashes = {"corpus": self.corpus, "model": self.model}
        metadata = {"key_stats": json.dumps(facts | hashes)}
        save_arrays(path, {"moment": self.moment}, metadata)
        return path

    @classmethod
    def load(cls, path: str | Path) -> KeyStats:
        """Read what `save` wrote; InputError for another file."""
        path = Path(path).expanduser()
        if not path.is_file():
            raise InputError(f"{path}: no such file; expected key statistics")
        try:
            arrays, metadata = load_arrays(path)
            facts = json.loads(metadata["key_stats"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"{path}: these are no key statistics ({error})") from error
        return replace(
            cls.from_moment(arrays["moment"], facts["count"], facts["layer"]),
            corpus=facts["corpus"],
            model=facts["model"],
        )

    def summary(self) -> str:
        tokens = f"{self.count / len(self.moment):.1f} tokens a direction"
        return (
            f"keys of block {self.layer}: {len(self.moment)} wide, {self.count} tokens ({tokens})"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "count": self.count,
            "d0": len(self.moment),
            "corpus": self.corpus,
            "model": self.model,
        }


def check_stats(given: Mapping[int, KeyStats], module: EditedModule) -> tuple[KeyStats, str]:
    """The statistics of a module and its matrix's hash; InputError for those of another one."""
    layer, stats, digest = module.layer, given.get(module.layer), module.digest()
    if stats is None:
        raise InputError(f"there are no key statistics of block {layer}, only of {sorted(given)}")
    if stats.layer != layer or len(stats.moment) != module.width:
        raise InputError(
            f"the statistics for block {layer} are those of block {stats.layer}, "
            f"{len(stats.moment)} wide; expected {module.width}"
        )
    if stats.model and stats.model != digest:
        raise InputError(
            f"the statistics of block {layer} were collected on another model; collect them on "
            "this one"
        )
    return stats, digest


def collect_key_stats(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str] | None,
    layers: Sequence[int],
    *,
    max_tokens: int | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[int, KeyStats]:
    """The second moment of the keys of each layer over all tokens of raw `texts`.

    `texts` None: the model writes them, from random first tokens at temperature 1 with `seed`.
    `max_tokens` ends the reading (default: everything, or `written_tokens` where the model writes;
    how long that will take is said before). Nothing behind the last layer is computed. `folder`
    keeps the sums while they are collected, so that a run with the same texts that was ended goes
    on where it stood.

    Raises InputError for no texts and for layers that do not exist, ArchitectureError for a layer
    whose keys are routed, ModelError for keys that are NaN or inf.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> stats = collect_key_stats(model, tokenizer, ["Bring me the lamp."], [1])
    >>> stats[1].count
    7
    """
    modules = edited_modules(model, layers)
    width = max(module.width for module in modules.values())
    if texts is None:
        max_tokens = max_tokens or written_tokens(width)
        rows = _written(model, tokenizer, max_tokens, seed, progress)
    else:
        if isinstance(texts, str) or not texts:
            raise InputError(f"texts is {shown(texts)}; expected a list of texts, not empty")
        rows = [[int(i) for i in tokenizer.encode(text)][:LONGEST] for text in texts]
    rows = _cut(rows, max_tokens)
    corpus = hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
    sums = _Sums(modules, corpus, None if folder is None else Path(folder).expanduser())
    taken: dict[str, mx.array] = {}

    def read(path: str, x: mx.array, experts: mx.array | None) -> None:
        taken[path] = x

    todo = list(Batches(rows, budget=token_budget(model), equal_lengths=not can_pad(model)))
    paths = [path for module in modules.values() for path in (module.path, module.gate) if path]
    with module_inputs(model, paths, read):
        for number, batch in enumerate(todo, 1):
            if number > sums.batches:
                forward(model, batch.tokens, lengths=batch.lengths, positions=None, logits=False)
                real = mx.arange(batch.tokens.shape[1])[None] < mx.array(batch.lengths)[:, None]
                keys = {n: m.keys(taken) * real.reshape(-1, 1) for n, m in modules.items()}
                sums.add(keys, sum(batch.lengths))
                if number % _SAVE_EVERY == 0 or number == len(todo):
                    sums.save()
            if progress:
                progress("key statistics", number, len(todo))
    return sums.stats()


class _Sums:
    """Σ k kᵀ per layer, and how many batches are in it."""

    def __init__(self, modules: Any, corpus: str, folder: Path | None) -> None:
        self.modules, self.corpus, self.folder = modules, corpus, folder
        self.count = self.batches = 0
        self.models = {layer: module.digest() for layer, module in modules.items()}
        self.totals = {layer: mx.zeros((m.width, m.width)) for layer, m in modules.items()}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._resume(folder / "sums.vauban")

    def _key(self) -> str:
        return json.dumps([self.corpus, {str(k): v for k, v in self.models.items()}])

    def _resume(self, path: Path) -> None:
        if not path.is_file():
            return
        arrays, metadata = load_arrays(path)
        if metadata.get("key") == self._key():
            self.count, self.batches = int(metadata["count"]), int(metadata["batches"])
            self.totals = {layer: arrays[str(layer)] for layer in self.totals}

    def add(self, keys: dict[int, mx.array], count: int) -> None:
        for layer, k in keys.items():
            self.totals[layer] = self.totals[layer] + k.T @ k
        mx.eval(self.totals)
        self.count += count
        self.batches += 1

    def save(self) -> None:
        """Replace the file as a whole, so that a kill leaves the old one."""
        if self.folder is None:
            return
        arrays = {str(layer): total for layer, total in self.totals.items()}
        counts = {"count": str(self.count), "batches": str(self.batches)}
        save_arrays(self.folder / "sums.vauban", arrays, {"key": self._key(), **counts})

    def stats(self) -> dict[int, KeyStats]:
        for layer, total in self.totals.items():
            if not np.isfinite(np.array(total)).all():
                raise ModelError(f"the keys of block {layer} hold NaN or inf")
        return {
            layer: KeyStats(total / self.count, self.count, layer, self.corpus, self.models[layer])
            for layer, total in self.totals.items()
        }


def _cut(rows: list[list[int]], max_tokens: int | None) -> list[list[int]]:
    """The first `max_tokens` tokens of all rows; rows without tokens are left out."""
    kept, room = [], sum(map(len, rows)) if max_tokens is None else max_tokens
    if room < 1:
        raise InputError(f"max_tokens is {max_tokens}, the texts have {sum(map(len, rows))}")
    for row in rows:
        if row[:room]:
            kept.append(row[:room])
        room -= len(row[:room])
    return kept


def written_tokens(width: int) -> int:
    """How many tokens a model writes for keys of this width: four times as many, from 16384 tokens
    on twice as many.

    >>> written_tokens(1536), written_tokens(14336)
    (6144, 28672)
    """
    return min(_WRITTEN * width, max(_MANY, _WIDE * width))


def _written(
    model: nn.Module, tokenizer: Any, count: int, seed: int, progress: Progress | None
) -> list[list[int]]:
    """Texts of the model's own with `count` tokens or more, each from another first token.

    Before the first of them a few tokens are written to tell how long it will take.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    firsts = iter(probe_tokens(count, anatomy(model).vocabulary, seed % 3))
    eos = eos_ids(tokenizer)
    rows: list[list[int]] = []
    done = 0
    while done < count:
        number = min(_ROWS, -(-(count - done) // _TEXT))
        starts = [[i] if bos is None else [bos, i] for i in islice(firsts, number)]
        if progress and not rows:
            verify_forward(model)
            began = time.monotonic()
            generate_tokens(model, starts, eos=frozenset(), max_tokens=_PROBED, temperature=1.0)
            span = (time.monotonic() - began) * count / (number * (_PROBED + 1))
            progress(f"the model writes {count} tokens, about {span:.0f} s", 1, 1)
        ends = generate_tokens(
            model, starts, eos=eos, max_tokens=_TEXT, temperature=1.0, seed=seed + len(rows)
        )
        rows += [start + end for start, end in zip(starts, ends, strict=True)]
        done = sum(map(len, rows))
        if progress:
            progress("write texts", min(done, count), count)
    return rows
