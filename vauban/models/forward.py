"""The forward pass that returns the residual stream: an explicit loop, verified, else the tap.

Two paths give the same numbers. "manual" walks `model.layers` itself: embed, mask, blocks, norm,
head. "tap" runs the model's own forward with recording blocks, for every family that the loop does
not cover. Which one is used is decided once per model by `verify_forward`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache, make_prompt_cache

from vauban.errors import ArchitectureError, InputError
from vauban.interventions import Intervention
from vauban.models.anatomy import Anatomy, anatomy
from vauban.models.taps import Stream, stream_changes, tapped

Positions = Literal["last", "all"] | tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class ForwardOutput:
    """`logits` (B, T, V) or (B, 1, V) or None; `residual` (B, L+1, P, d) or None.

    residual r < L is the input of block r, after interventions at that site; residual L is the
    output of the last block, before the final norm.
    """

    logits: mx.array | None
    residual: mx.array | None


@dataclass(frozen=True)
class ForwardCheck:
    """Result of `verify_forward`: largest |difference| of logits, relative to the largest logit."""

    ok: bool
    max_difference: float
    path: Literal["manual", "tap"]
    family: str
    tokens: int
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        return (
            f"{self.family}: {self.path} forward, largest difference {self.max_difference:.1e} "
            f"over {self.tokens} tokens{f' ({self.note})' if self.note else ''}"
        )


def family_of(model: nn.Module) -> str:
    """The name of the mlx-lm model file that defines this model."""
    return type(model).__module__.rsplit(".", 1)[-1]


def forward(
    model: nn.Module,
    tokens: mx.array,
    *,
    lengths: Sequence[int] | None = None,
    cache: list[Any] | None = None,
    positions: Positions = "last",
    interventions: Sequence[Intervention] = (),
    logits: bool | Literal["last"] = True,
) -> ForwardOutput:
    """Run `model` on right-padded `tokens` (B, T) and return logits and residuals.

    `lengths` (B,) counts each row's real tokens (default: all T). `positions`: "last", "all",
    None (no residuals), or a tuple of negative ints counted from each row's last real token.
    `cache`: a filled prompt cache of batch size B, updated in place; default a fresh one.
    `logits`: True for all positions, "last" for each row's last real token, False for none.

    Raises InputError for empty or mismatched input, positions beyond a prompt and token ids out
    of range; ArchitectureError when no verified path exists.

    >>> import mlx.core as mx, vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> out = vauban.forward(model, mx.array([vauban.encode_chat(tokenizer, "Hello")]))
    >>> out.residual.shape[1] == len(model.layers) + 1
    True
    """
    parts = anatomy(model)
    rows, width = _check_tokens(tokens, parts)
    counts = _check_lengths(lengths, rows, width)
    index = _position_index(positions, counts, width)
    check = verify_forward(model)
    if cache is None:
        cache = make_prompt_cache(model)
    run = _manual if check.path == "manual" else _tap
    last = mx.array([n - 1 for n in counts])
    out, residuals = run(
        model, parts, tokens, cache, interventions, index is not None, logits, last
    )
    if index is None:
        return ForwardOutput(out, None)
    gather = index[:, :, None]
    kept = [mx.take_along_axis(_rows(h, rows), gather, axis=1) for h in residuals]
    return ForwardOutput(out, mx.stack(kept, axis=1))


def _rows(h: mx.array, rows: int) -> mx.array:
    if h.ndim != 3 or h.shape[0] != rows:
        raise ArchitectureError(
            f"the stream has shape {h.shape} between blocks; expected (batch, tokens, d)"
        )
    return h


def _check_tokens(tokens: mx.array, parts: Anatomy) -> tuple[int, int]:
    if tokens.ndim != 2 or tokens.size == 0:
        raise InputError(f"tokens have shape {tokens.shape}; expected (batch, length), not empty")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= parts.vocabulary:
        raise InputError(
            f"token ids run from {low} to {high}; the vocabulary holds 0 to {parts.vocabulary - 1}"
        )
    return int(tokens.shape[0]), int(tokens.shape[1])


def _check_lengths(lengths: Sequence[int] | None, rows: int, width: int) -> list[int]:
    if lengths is None:
        return [width] * rows
    counts = [int(n) for n in lengths]
    if len(counts) != rows:
        raise InputError(f"{len(counts)} lengths for {rows} rows of tokens")
    if min(counts) < 1 or max(counts) > width:
        raise InputError(f"lengths {min(counts)} to {max(counts)}; expected 1 to {width}")
    return counts


def _position_index(positions: Positions, counts: list[int], width: int) -> mx.array | None:
    """(B, P) column of each wanted position, None when no residual is wanted."""
    if positions is None:
        return None
    if isinstance(positions, str):
        if positions == "last":
            positions = (-1,)
        elif positions == "all":
            return mx.broadcast_to(mx.arange(width)[None], (len(counts), width))
        else:
            raise InputError(f"positions is {positions!r}; expected 'last', 'all', None or ints")
    offsets = tuple(int(p) for p in positions)
    if not offsets or max(offsets) >= 0:
        raise InputError(f"positions {offsets}; expected negative ints counted from the last token")
    if -min(offsets) > min(counts):
        raise InputError(
            f"position {min(offsets)} lies before the first token of a prompt of "
            f"{min(counts)} tokens"
        )
    return mx.array(counts)[:, None] + mx.array(offsets)[None]


def _pick(h: mx.array, logits: bool | Literal["last"], last: mx.array) -> mx.array:
    return mx.take_along_axis(h, last[:, None, None], axis=1) if logits == "last" else h


def _tap(
    model: nn.Module,
    parts: Anatomy,
    tokens: mx.array,
    cache: list[Any],
    interventions: Sequence[Intervention],
    record: bool,
    logits: bool | Literal["last"],
    last: mx.array,
) -> tuple[mx.array | None, list[mx.array]]:
    with tapped(model, interventions, stream=Stream(recording=record)) as stream:
        out = model(tokens, cache=cache)
    if record and len(stream.residuals) != parts.n_layers + 1:
        raise ArchitectureError(
            f"{family_of(model)} ran {len(stream.residuals) - 1} of its {parts.n_layers} blocks "
            "as modules; its stream cannot be recorded"
        )
    return (_pick(out, logits, last) if logits else None), stream.residuals


def _manual(
    model: nn.Module,
    parts: Anatomy,
    tokens: mx.array,
    cache: list[Any],
    interventions: Sequence[Intervention],
    record: bool,
    logits: bool | Literal["last"],
    last: mx.array,
) -> tuple[mx.array | None, list[mx.array]]:
    residuals = []
    with tapped(model, interventions, blocks=False):
        h = parts.embedding(tokens)
        mask = create_attention_mask(h, cache[0])
        for index, (layer, state) in enumerate(zip(parts.layers, cache, strict=True)):
            step = stream_changes(interventions, "block_input", index, parts.n_layers)[True]
            h = step(h) if step else h
            if record:
                residuals.append(h)
            h = layer(h, mask, state)
        step = stream_changes(interventions, "block_input", parts.n_layers, parts.n_layers)[True]
        h = step(h) if step else h
        if record:
            residuals.append(h)
        if not logits:
            return None, residuals
        return _head(model, parts, _pick(h, logits, last)), residuals


def _head(model: nn.Module, parts: Anatomy, h: mx.array) -> mx.array:
    h = parts.norm(h) if parts.norm is not None else h
    return parts.embedding.as_linear(h) if parts.tied else model.lm_head(h)


def _walkable(model: nn.Module, parts: Anatomy) -> bool:
    """Whether the textbook loop can even be tried: (h, mask, cache) blocks, plain KV caches."""
    for layer in parts.layers:
        names = list(inspect.signature(type(layer).__call__).parameters)[1:]
        if len(names) != 3 or names[1:] != ["mask", "cache"]:
            return False
    cache = make_prompt_cache(model)
    head_is_here = parts.tied or parts.head_path == "lm_head"
    return (
        parts.norm is not None
        and head_is_here
        and len(cache) == parts.n_layers
        and all(type(state) is KVCache for state in cache)
    )


def verify_forward(model: nn.Module) -> ForwardCheck:
    """Compare the explicit loop with `model(tokens)`, once per loaded model.

    On agreement (1e-4 of the largest logit; 2e-2 in half precision) the loop is used, else the
    tap, which is compared in the same way. Raises ArchitectureError when neither agrees or the
    model puts out NaN. The result is kept with the model until its weights' identity changes.
    """
    known = getattr(model, "_vauban_check", None)
    if known is not None:
        return known
    parts = anatomy(model)
    width = 48
    # A fixed walk through the vocabulary: every run checks the same tokens.
    tokens = (mx.arange(width)[None] * 7919 + 13) % min(parts.vocabulary, 50_000)
    reference = model(tokens, cache=make_prompt_cache(model)).astype(mx.float32)
    scale = float(mx.abs(reference).max())
    if not scale < float("inf"):
        raise ArchitectureError(
            f"{family_of(model)} puts out NaN or inf on plain tokens; its weights are broken"
        )
    half = any(p.dtype in (mx.float16, mx.bfloat16) for p in parts.embedding.parameters().values())
    tolerance = (2e-2 if half else 1e-4) * max(scale, 1e-6)
    last = mx.array([width - 1])
    tried = []
    paths: list[tuple[Literal["manual", "tap"], Any]] = [("tap", _tap)]
    if _walkable(model, parts):
        paths.insert(0, ("manual", _manual))
    for path, run in paths:
        try:
            got, residuals = run(
                model, parts, tokens, make_prompt_cache(model), (), True, True, last
            )
            difference = float(mx.abs(got.astype(mx.float32) - reference).max())
        except (TypeError, ValueError, AttributeError, ArchitectureError) as error:
            # A family that this path cannot walk; the message says so, the next path is tried.
            tried.append(f"{path} fails ({error})")
            continue
        tried.append(f"{path} differs by {difference:.1e}")
        if difference <= tolerance and residuals[-1].ndim == 3:
            note = tried[0] + ", so the tap is used" if len(tried) > 1 else ""
            check = ForwardCheck(True, difference, path, family_of(model), width, note)
            object.__setattr__(model, "_vauban_check", check)
            return check
    raise ArchitectureError(
        f"no forward pass of vauban agrees with {family_of(model)}'s own: {'; '.join(tried)}"
    )
