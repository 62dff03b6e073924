"""What vauban does on one tiny model of each family, measured: behind the tests and the docs page.

Every figure compares with something computed another way: the model's own forward, single prompts,
the tap, the numeric probe, token-by-token decoding. Nothing is asserted here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

import vauban
from tests.architectures.build import build, module_of
from vauban._common import probe_tokens
from vauban.generation import generate_tokens, prefix_cache, repeated
from vauban.generation.uneven import uneven_batches
from vauban.models import anatomy, branches, can_share, residual_writers
from vauban.models.families import family_of
from vauban.models.module_probe import ProbeReport, compare_with_probe, silenced
from vauban.models.walk import Pass, by_hand, by_tap


@dataclass(frozen=True)
class Facts:
    """One configuration. Differences are relative to the largest value compared; None: not run."""

    name: str
    module: str
    refused: str = ""
    path: str = ""
    note: str = ""
    parity: float | None = None
    padding: float | None = None
    prefix: float | None = None
    """None where the prefix is not shared."""
    capture: float | None = None
    """None where the blocks are not called as modules."""
    probe: ProbeReport | None = None
    kinds: tuple[str, ...] = ()
    gains: bool = False
    biases: bool = False
    embedding: str = ""
    leak: float | None = None
    sites: str = ""
    """Whether a change of a block's terms reaches the stream as it is: "exact", or why not."""
    uneven: bool = False
    generated: bool = False
    lens: float | None = None
    """The last residual read by `unembed`, against the model's own logits."""


@cache
def model_of(name: str) -> nn.Module:
    """The model of a configuration, built once; tests leave it as it is."""
    return build(name)


def difference(a: mx.array, b: mx.array) -> float:
    """Largest |a - b| over the largest |b|; entries that a family rules out (-inf) count as 0."""
    a, b = (mx.where(x == -mx.inf, 0, x).astype(mx.float32) for x in (a, b))
    return float(mx.abs(a - b).max() / mx.maximum(mx.abs(b).max(), 1e-6))


def row(name: str, count: int, seed: int) -> list[int]:
    """Token ids of a prompt, within the first 160 of any vocabulary."""
    top = min(anatomy(model_of(name)).vocabulary, 160)
    return mx.random.randint(1, top, (count,), key=mx.random.key(seed)).tolist()


@cache
def measure(name: str) -> Facts:
    """All facts of a configuration; of a refused one only why."""
    model = model_of(name)
    try:
        check = vauban.verify_forward(model)
    except vauban.ArchitectureError as error:
        return Facts(name, module_of(name), refused=str(error))
    writers = residual_writers(model)
    direction = mx.random.normal((writers[0].shape[1],), key=mx.random.key(3))
    plan = vauban.plan_cut(model, direction, embedding=True)
    return Facts(
        name,
        module_of(name),
        path=check.path,
        note=check.note,
        parity=_parity(name, model),
        padding=_padding(name, model),
        prefix=_prefix(name, model),
        capture=_capture(name, model),
        probe=compare_with_probe(model, writers),
        kinds=tuple(dict.fromkeys(w.kind for w in writers)),
        gains=any(w.gain is not None for w in writers),
        biases=any(w.bias for w in writers),
        embedding=plan.embedding,
        leak=plan.stream_leak(model),
        sites=_sites(model),
        uneven=uneven_batches(model).ok,
        generated=_generates(name, model),
        lens=_lens(name, model),
    )


def _parity(name: str, model: nn.Module) -> float:
    """Logits of vauban's forward against `model(tokens)`, on other tokens than `verify_forward`."""
    tokens = mx.array([row(name, 29, 11)])
    out = vauban.forward(model, tokens, positions="all")
    return difference(out.logits, model(tokens, cache=make_prompt_cache(model)))


def _padding(name: str, model: nn.Module) -> float:
    rows = [row(name, n, n) for n in (21, 4, 13)]
    padded = mx.array([tokens + [0] * (21 - len(tokens)) for tokens in rows])
    out = vauban.forward(model, padded, lengths=[21, 4, 13], positions=(-2, -1), logits="last")
    return _against_single(model, rows, out)


def _prefix(name: str, model: nn.Module) -> float | None:
    if not can_share(model):
        return None
    head = row(name, 17, 5)
    ends = [row(name, n, n) for n in (11, 3, 6)]
    padded = mx.array([tokens + [0] * (11 - len(tokens)) for tokens in ends])
    out = vauban.forward(
        model,
        padded,
        lengths=[11, 3, 6],
        cache=repeated(prefix_cache(model, head, ()), 3),
        positions=(-2, -1),
        logits="last",
    )
    return _against_single(model, [head + end for end in ends], out)


def _against_single(model: nn.Module, rows: list[list[int]], out: Any) -> float:
    worst = 0.0
    for i, tokens in enumerate(rows):
        single = vauban.forward(model, mx.array([tokens]), positions=(-2, -1), logits="last")
        worst = max(
            worst,
            difference(out.residual[i], single.residual[0]),
            difference(out.logits[i], single.logits[0]),
        )
    return worst


def _capture(name: str, model: nn.Module) -> float | None:
    """The stream at every residual and position: the explicit loop against the tap."""
    tokens = mx.array([row(name, 19, 2)])
    _, by_loop = by_hand(model, Pass(tokens, make_prompt_cache(model)))
    if family_of(model) == "iquestloopcoder":
        return None
    _, recorded = by_tap(model, Pass(tokens, make_prompt_cache(model)))
    return max(difference(a, b) for a, b in zip(by_loop, recorded, strict=True))


def _lens(name: str, model: nn.Module) -> float:
    tokens = mx.array([row(name, 19, 2)])
    residual = vauban.forward(model, tokens, positions="all", logits=False).residual
    own = model(tokens, cache=make_prompt_cache(model))
    return difference(vauban.unembed(model, residual[:, -1]), own)


@dataclass(frozen=True)
class _At:
    """Adds a vector to one term of one block."""

    vector: mx.array
    site: str
    layer: int

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Any:
        return (lambda h: h + self.vector) if (site, layer) == (self.site, self.layer) else None


def _sites(model: nn.Module) -> str:
    """With every writer silenced, a term of a block is just what is added to it.

    The change must arrive as it is; a scalar that the block puts on the whole stream afterwards
    (Gemma 4) and a second round over the blocks are no error.
    """
    parts = anatomy(model)
    try:
        terms = branches(model)
    except vauban.ArchitectureError as error:
        return str(error)
    vector = mx.random.normal((parts.d_model,), key=mx.random.key(1))
    tokens = mx.array([probe_tokens(6, min(parts.vocabulary, 160))])

    def output(changes: tuple[_At, ...], layer: int) -> mx.array:
        with silenced(model):
            _, stream = by_hand(
                model, Pass(tokens, make_prompt_cache(model), changes, logits=False)
            )
        return stream[layer + 1].astype(mx.float32)

    for term in terms:
        moved = output((_At(vector, term.site, term.layer),), term.layer)
        moved = (moved - output((), term.layer)).reshape(-1, parts.d_model)[-1]
        scale = float(moved @ vector / (vector @ vector))
        off = float(mx.abs(moved - scale * vector).max())
        rounds = 2 if family_of(model) in ("nanbeige", "iquestloopcoder") else 1
        scaled = "layer_scalar" in parts.layers[term.layer]
        if off > 1e-3 or (not scaled and abs(scale - rounds) > 1e-3):
            return f"{term.path} arrives {scale:.3f} times, off by {off:.1e}"
    return "exact"


def _generates(name: str, model: nn.Module) -> bool:
    """Uneven prompts with a common start, some ended early, others in their place: as one prompt
    at a time."""
    head = row(name, 7, 9)
    lists = [head + row(name, n, n) for n in (3, 12, 12, 5)]
    free = [greedy(model, tokens, 5, frozenset()) for tokens in lists]
    eos = frozenset({free[1][2]})
    expected = [
        answer[: answer.index(free[1][2])] if free[1][2] in answer else answer for answer in free
    ]
    return all(
        generate_tokens(model, lists, eos=eos, max_tokens=5, batch_size=size) == expected
        for size in (None, 2)
    )


def greedy(model: nn.Module, tokens: list[int], count: int, eos: frozenset[int]) -> list[int]:
    """mlx-lm's own cached forward, one prompt, argmax."""
    caches = make_prompt_cache(model)
    logits = model(mx.array([tokens]), cache=caches)[:, -1]
    answer: list[int] = []
    while len(answer) < count:
        token = int(mx.argmax(logits[0]))
        if token in eos:
            break
        answer.append(token)
        logits = model(mx.array([[token]]), cache=caches)[:, -1]
    return answer
