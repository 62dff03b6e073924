"""Single modules while the model runs: what they read, and where what they put out arrives.

`module_inputs` shows what modules read, `output_gradients` how the model's predictions move with
what they put out. `probe_writers` finds the matrices that write to the residual stream by running
the model, not by their names: every leaf of a block whose output is as wide as the stream puts out
a constant instead, and is a writer iff the block's output still depends on it. Knows modules;
computes no edit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from vauban._common import largest, probe_tokens
from vauban.errors import InputError
from vauban.interventions import Intervention
from vauban.models.anatomy import Anatomy, anatomy, is_embedding
from vauban.models.forward import forward
from vauban.models.parity import verify_forward
from vauban.models.swap import around, swapped
from vauban.models.walk import Pass, by_hand, by_tap
from vauban.models.writers import Writer, residual_writers, unpacked_shape

Reader = Callable[[str, mx.array, mx.array | None], None]
_TOKENS = 6
# What does not depend on the constant is computed from the same numbers and stays bit for bit.
_FLOOR = 1e-7


def module_inputs(
    model: nn.Module, paths: Iterable[str], read: Reader
) -> AbstractContextManager[None]:
    """Inside the block every call of a module at `paths` first tells `read(path, x, experts)`.

    x (n, in) are its input rows; experts (n,) the expert of each row for stacked experts, else
    None. Raises InputError for a path the model does not have.
    """

    def call(path: str, inner: Callable[..., Any], x: mx.array, *args: Any, **kwargs: Any) -> Any:
        indices = args[0] if args else kwargs.get("indices")
        rows = x.reshape(-1, x.shape[-1])
        experts = None
        if indices is not None:
            experts = indices.reshape(-1)
            # One row may go to several experts: it is repeated for each of them.
            rows = mx.repeat(rows, experts.size // rows.shape[0], axis=0)
        read(path, rows, experts)
        return inner(x, *args, **kwargs)

    modules = _modules(model, paths)
    # The passes of a model's first check are not to be read.
    verify_forward(model)
    return swapped(around(module, partial(call, path)) for path, module in modules.items())


def output_gradients(
    model: nn.Module,
    paths: Iterable[str],
    tokens: mx.array,
    *,
    interventions: Iterable[Intervention] = (),
    key: mx.array,
) -> dict[str, mx.array]:
    """For each path ∇ log p(y) (B·T, d) with respect to that module's output at every position.

    tokens (B, T) without padding; y is drawn from the model's own next-token distribution with
    `key`, so that E[g gᵀ] is the Fisher information of the output (not the empirical one, which
    takes y from data). The module is called once per forward pass. Raises what mlx raises where
    an operation of the model has no gradient (ValueError or RuntimeError).
    """
    interventions = tuple(interventions)
    modules = _modules(model, paths)

    def logits() -> mx.array:
        out = forward(model, tokens, positions=None, interventions=interventions).logits
        assert out is not None
        return out.astype(mx.float32)

    zeros: dict[str, mx.array] = {}

    def shape(path: str, y: mx.array) -> mx.array:
        zeros[path] = mx.zeros(y.shape, mx.float32)
        return y

    with _outputs(modules, shape):
        drawn = mx.random.categorical(logits(), key=key)

    def likelihood(deltas: dict[str, mx.array]) -> mx.array:
        with _outputs(modules, lambda path, y: y + deltas[path].astype(y.dtype)):
            values = logits()
        chosen = mx.take_along_axis(values, drawn[..., None], -1)[..., 0]
        return (chosen - mx.logsumexp(values, -1)).sum()

    gradients = mx.grad(likelihood)(zeros)
    mx.eval(gradients)
    return {path: g.reshape(-1, g.shape[-1]) for path, g in gradients.items()}


def _modules(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    wanted = list(paths)
    unknown = [path for path in wanted if path not in modules]
    if unknown:
        raise InputError(f"the model has no module {unknown[0]}")
    return {path: modules[path] for path in wanted}


def _outputs(
    modules: Mapping[str, nn.Module], change: Callable[[str, mx.array], mx.array]
) -> AbstractContextManager[None]:
    """Inside the block what each module puts out is `change(path, y)`."""

    def call(path: str, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> mx.array:
        return change(path, inner(*args, **kwargs))

    return swapped(around(module, partial(call, path)) for path, module in modules.items())


@dataclass(frozen=True, eq=False)
class ProbedWriter:
    """One writer that the probe found: its path, its block, and the measured gain (out,).

    The gain is scaled to a root mean square of one; all ones where nothing stands between the
    writer and the stream, whatever scalar multiplies it.
    """

    path: str
    layer: int
    gain: mx.array


@dataclass(frozen=True)
class ProbeReport:
    """How the rule over names compares with the probe; both differences are empty when they agree.

    `gains` is the largest |cosine - 1| between a writer's gain and the measured one.
    """

    missed: tuple[str, ...]
    invented: tuple[str, ...]
    gains: float

    @property
    def ok(self) -> bool:
        return not self.missed and not self.invented and self.gains < 1e-3


class _Constants:
    """What the leaves put out: `value` at `path`, zeros at every other; `ran` collects calls."""

    def __init__(self) -> None:
        self.path = ""
        self.value: mx.array | float = 0.0
        self.ran: set[str] = set()

    def __call__(self, path: str, y: mx.array) -> mx.array:
        self.ran.add(path)
        if path != self.path:
            return mx.zeros_like(y)
        return mx.broadcast_to(mx.array(self.value).astype(y.dtype), y.shape)


def silenced(model: nn.Module) -> AbstractContextManager[None]:
    """Inside the block every matrix that could write to the stream puts out zeros."""
    return _outputs(_candidates(anatomy(model)), _Constants())


def probe_writers(model: nn.Module) -> list[ProbedWriter]:
    """All residual writers inside the blocks, with their measured gains, block by block.

    Runs the model twice per candidate on a few tokens. A balanced constant of plus and minus one
    also tells the gain between writer and stream. An expert of a list that no token was routed to
    is taken for what its neighbours are.
    """
    check = verify_forward(model)
    parts = anatomy(model)
    leaves = _candidates(parts)
    constants = _Constants()
    run = by_hand if check.path == "manual" else by_tap
    tokens = mx.array([probe_tokens(_TOKENS, parts.vocabulary)])
    signs = mx.where(mx.arange(parts.d_model) % 2 == 0, 1.0, -1.0)
    # A fixed shuffle, so that no structure of the columns goes with the signs.
    signs = signs[mx.argsort(mx.random.uniform(shape=signs.shape, key=mx.random.key(0)))]

    def output(layer: int, path: str, value: mx.array | float) -> mx.array:
        constants.path, constants.value = path, value
        _, stream = run(model, Pass(tokens, make_prompt_cache(model), logits=False))
        return stream[layer + 1].astype(mx.float32)

    writers: list[ProbedWriter] = []
    silent: list[str] = []
    with _outputs(leaves, constants):
        for path in leaves:
            layer = _layer_of(path, parts)
            still = output(layer, "", 0.0)
            size = mx.sqrt(mx.mean(mx.square(still))) + 1e-3
            constants.ran.clear()
            moved = output(layer, path, signs * size) - output(layer, path, -signs * size)
            vectors = (moved * signs).reshape(-1, parts.d_model)
            norms = mx.linalg.norm(vectors, axis=-1)
            if float(norms.max()) <= _FLOOR * float(size):
                silent += [] if path in constants.ran else [path]
                continue
            gain = vectors[mx.argmax(norms)]
            # A scalar may flip every sign (a learned correction between streams).
            gain = gain / mx.sqrt(mx.mean(mx.square(gain))) * mx.sign(gain.sum())
            writers.append(ProbedWriter(path, layer, gain))
    writers += _never_called(writers, silent, parts)
    return sorted(writers, key=lambda probed: probed.layer)


def compare_with_probe(model: nn.Module, writers: Sequence[Writer] | None = None) -> ProbeReport:
    """Whether the writers found by name are those that the probe finds, with the same gains."""
    named = {w.path: w for w in (writers or residual_writers(model)) if w.layer >= 0}
    probed = {p.path: p for p in probe_writers(model)}

    def off(path: str) -> float:
        gain, measured = named[path].gain, probed[path].gain
        expected = mx.ones(measured.shape) if gain is None else gain
        cosine = (expected @ measured) / (mx.linalg.norm(expected) * mx.linalg.norm(measured))
        return abs(1.0 - abs(float(cosine)))

    missed, invented = probed.keys() - named.keys(), named.keys() - probed.keys()
    gains = largest(map(off, named.keys() & probed.keys()))
    return ProbeReport(tuple(sorted(missed)), tuple(sorted(invented)), gains)


def _candidates(parts: Anatomy) -> dict[str, nn.Module]:
    """Leaves with a matrix whose output is as wide as the stream, in blocks, by path."""
    leaves = {}
    for layer, path in zip(parts.layers, parts.layer_paths, strict=True):
        for inside, module in layer.named_modules():
            weight = module.get("weight")
            if not isinstance(weight, mx.array) or weight.ndim < 2 or module.children():
                continue
            if is_embedding(module) or "conv" in type(module).__name__.lower():
                continue
            if unpacked_shape(module)[-2] == parts.d_model:
                leaves[f"{path}.{inside}"] = module
    return leaves


def _layer_of(path: str, parts: Anatomy) -> int:
    return next(i for i, p in enumerate(parts.layer_paths) if path.startswith(f"{p}."))


def _never_called(
    writers: list[ProbedWriter], silent: list[str], parts: Anatomy
) -> list[ProbedWriter]:
    """Leaves that never ran, where others of the same path but for numbers are writers."""
    patterns = {re.sub(r"\d+", "#", probed.path): probed.gain for probed in writers}
    return [
        ProbedWriter(path, _layer_of(path, parts), patterns[re.sub(r"\d+", "#", path)])
        for path in silent
        if re.sub(r"\d+", "#", path) in patterns
    ]
