"""The forward pass that returns the residual stream: an explicit loop, verified, else the tap.

Two paths give the same numbers. "manual" walks `model.layers` itself: embed, mask, blocks, norm,
head. "tap" runs the model's own forward with recording blocks, for every family that the loop does
not cover. Which one is used is decided once per model by `verify_forward`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from vauban.errors import ArchitectureError, InputError
from vauban.interventions import Intervention
from vauban.models.anatomy import Anatomy, anatomy
from vauban.models.taps import Stream, record_reads, stream_changes, stream_place, tapped
from vauban.models.walk import arguments, finish, rehearse

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
    streams: Literal["read", "all"] = "read",
) -> ForwardOutput:
    """Run `model` on right-padded `tokens` (B, T) and return logits and residuals.

    `lengths` (B,) counts each row's real tokens (default: all T). `positions`: "last", "all",
    None (no residuals), or a tuple of negative ints counted from each row's last real token.
    `cache`: a filled prompt cache of batch size B, updated in place; default a fresh one.
    `logits`: True for all positions, "last" for each row's last real token, False for none.
    `streams`: where a model carries several streams (Gemma 3n, DeepSeek V4.1) "read" returns what
    the next block's norm reads, "all" the streams themselves, (B, L+1, P, S, d).

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
    several = _several_streams(model)
    with ExitStack() as stack:
        reads = stack.enter_context(_reading(model, parts)) if several else {}
        out, residuals = run(
            model, parts, tokens, cache, interventions, index is not None, logits, last
        )
    if index is None:
        return ForwardOutput(out, None)
    if several and streams == "read":
        residuals = [reads[r] for r in range(parts.n_layers + 1)]
    elif several:
        kept = [_gather_streams(h, rows, index) for h in residuals]
        return ForwardOutput(out, mx.stack(kept, axis=1))
    gather = index[:, :, None]
    kept = [mx.take_along_axis(_rows(h, rows), gather, axis=1) for h in residuals]
    return ForwardOutput(out, mx.stack(kept, axis=1))


# Families whose blocks carry one array that is not yet what their norm reads.
_READ_BY_NORM = ("kimi_k3",)


def _several_streams(model: nn.Module) -> bool:
    return bool(getattr(model, "_vauban_several", False)) or family_of(model) in _READ_BY_NORM


@contextmanager
def _reading(model: nn.Module, parts: Anatomy) -> Iterator[dict[int, mx.array]]:
    """What each block's first norm and the final norm read, by residual index."""
    norms = [layer.get("input_layernorm") for layer in parts.layers]
    found: dict[int, mx.array] = {}
    changed: list[tuple[nn.Module, type]] = []
    try:
        record_reads([*norms, parts.norm], found, lambda m: changed.append((m, type(m))))
        yield found
    finally:
        for module, cls in reversed(changed):
            module.__class__ = cls


def _gather_streams(h: mx.array, rows: int, index: mx.array) -> mx.array:
    """(B, P, S, d) of streams stored as (S, B, T, d) or (B, T, S, d)."""
    if h.ndim != 4:
        return mx.take_along_axis(_rows(h, rows), index[:, :, None], axis=1)[:, :, None]
    if h.shape[0] != rows or h.shape[1] == rows:
        h = h.transpose(1, 2, 0, 3)
    return mx.take_along_axis(h, index[:, :, None, None], axis=1)


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
    if logits != "last":
        return h
    if h.ndim != 3:
        raise ArchitectureError(f"the stream has shape {h.shape}; ask for all logits")
    return mx.take_along_axis(h, last[:, None, None], axis=1)


def _tap(
    model: nn.Module,
    parts: Anatomy,
    tokens: mx.array,
    cache: list[Any],
    interventions: Sequence[Intervention],
    record: bool,
    logits: bool | Literal["last"],
    last: mx.array,
    stream: Stream | None = None,
) -> tuple[mx.array | None, list[mx.array]]:
    """The model's own forward, its blocks recording."""
    stream = stream or Stream(recording=record)
    with tapped(model, interventions, stream=stream):
        out = model(tokens, cache=cache)
    if record and len(stream.residuals) != parts.n_layers + 1:
        raise ArchitectureError(
            f"{family_of(model)} does not run its {parts.n_layers} blocks as modules "
            f"({len(stream.inputs)} were seen); its stream cannot be recorded"
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
    """The explicit loop: embed, blocks, norm, head. No hook sees the stream but this function."""
    n = parts.n_layers
    extras, place = model._vauban_extras, stream_place(model)
    residuals: list[mx.array] = []

    def pass_by(h: mx.array, residual: int) -> mx.array:
        step = stream_changes(interventions, "block_input", residual, n)[True]
        h = step(h) if step else h
        if record:
            residuals.append(h)
        return h

    with tapped(model, interventions, blocks=False):
        walk = rehearse(model, parts.layers, tokens, cache, extras, place)
        h, results = walk.start, []
        for call in walk.calls:
            args, kwargs = arguments(call, results)
            args.insert(place, pass_by(h, call.block))
            out = parts.layers[call.block](*args, **kwargs)
            h, *rest = out if isinstance(out, tuple) else (out,)
            results.append(tuple(rest))
        h = pass_by(h, n)
        if not logits and not _several_streams(model):
            return None, residuals
        h = _pick(h, logits, last)
        return finish(model, parts.layers, tokens, cache, h, results, place), residuals


def window_of(cache: Sequence[Any]) -> int:
    """The longest sliding window or chunk among the caches, 0 without one."""
    sizes = [0]
    for state in cache:
        for inner in getattr(state, "caches", (state,)):
            for name in ("max_size", "chunk_size", "window_size"):
                size = getattr(inner, name, None)
                if isinstance(size, int):
                    sizes.append(size)
    return max(sizes)


# Past this many tokens the check would cost more than it tells; it then says so.
_LONGEST_CHECK = 2100


def verify_forward(model: nn.Module) -> ForwardCheck:
    """Compare vauban's forward with `model(tokens)`, once per loaded model.

    The prompt is longer than any sliding window up to 2048 tokens. Logits must agree to 1e-4 of
    the largest one (2e-2 in half precision), and the explicit loop's residuals with those that
    the tap records. On agreement the explicit loop is used, else the tap, which is compared in
    the same way. Raises ArchitectureError when neither agrees or the model puts out NaN.
    """
    known = getattr(model, "_vauban_check", None)
    if known is not None:
        return known
    parts = anatomy(model)
    window = window_of(make_prompt_cache(model))
    width = 48 if window + 9 > _LONGEST_CHECK else max(48, window + 9)
    notes = [] if width > window else [f"its window of {window} is longer than the check"]
    learned = getattr(getattr(model, "args", None), "n_positions", None)
    if isinstance(learned, int):
        # Learned positions end: past them GPT-2's kind reads beyond its table.
        width = min(width, learned)
    # A fixed walk through the vocabulary: every run checks the same tokens.
    tokens = (mx.arange(width)[None] * 7919 + 13) % min(parts.vocabulary, 50_000)
    reference = model(tokens, cache=make_prompt_cache(model)).astype(mx.float32)
    scale = float(mx.abs(reference).max())
    if not scale < float("inf"):
        raise ArchitectureError(
            f"{family_of(model)} puts out NaN or inf on plain tokens; its weights are broken"
        )
    half = _is_half(parts)
    tolerance = 2e-2 if half else 1e-4
    last = mx.array([width - 1])
    stream = Stream(recording=True)
    tried: list[str] = []

    def attempt(path: Literal["manual", "tap"], run: Any, against: list[mx.array]) -> Any:
        """(check, residuals) when `run` agrees with the reference, else None and a note."""
        try:
            got, residuals = run(
                model, parts, tokens, make_prompt_cache(model), (), True, True, last
            )
            difference = float(mx.abs(got.astype(mx.float32) - reference).max())
            worst = max(
                (
                    float(mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max())
                    / max(float(mx.abs(b.astype(mx.float32)).max()), 1e-6)
                    for a, b in zip(residuals, against, strict=bool(against))
                ),
                default=0.0,
            )
        except (TypeError, ValueError, AttributeError, KeyError, ArchitectureError) as error:
            # A family that this path cannot walk; the note says why, the other path is tried.
            tried.append(f"{path}: {str(error).splitlines()[0]}")
            return None
        if difference > tolerance * max(scale, 1e-6) or worst > tolerance:
            tried.append(f"{path}: logits differ by {difference:.1e}, residuals by {worst:.1e}")
            return None
        return ForwardCheck(True, difference, path, family_of(model), width), residuals

    by_tap = attempt("tap", partial(_tap, stream=stream), [])
    place = _find_place(stream, parts.n_layers)
    if place:
        # The stream is not the blocks' first argument: what was recorded was something else.
        object.__setattr__(model, "_vauban_place", place)
        stream, tried = Stream(recording=True), []
        by_tap = attempt("tap", partial(_tap, stream=stream), [])
    elif place is None and stream.rounds == 1:
        notes.append("the trunk changes the stream between blocks; residuals are what blocks read")
    if stream.rounds > 1:
        notes.append(f"{stream.rounds} rounds over the blocks; residuals are the last round's")
    extras = [stream.extras.get(i, 0) for i in range(parts.n_layers)]
    object.__setattr__(model, "_vauban_extras", extras)
    by_hand = attempt("manual", _manual, by_tap[1] if by_tap else [])
    if by_hand is None and by_tap is None:
        raise ArchitectureError(
            f"no forward pass of vauban agrees with {family_of(model)}'s own: {'; '.join(tried)}"
        )
    if by_hand is None:
        notes.append(f"{tried[-1]}, so the tap is used")
    several = any(h.ndim == 4 for h in (by_hand or by_tap)[1])
    object.__setattr__(model, "_vauban_several", several)
    check = replace((by_hand or by_tap)[0], note="; ".join(notes))
    object.__setattr__(model, "_vauban_check", check)
    return check


def _find_place(stream: Stream, n_layers: int) -> int | None:
    """The argument of every block that is the output of the block before; None when there is none.

    Most blocks take the stream first; talkie's take the embedding first and the stream second.
    """
    places = None
    for i in range(1, n_layers):
        if i not in stream.arguments or i - 1 not in stream.outputs:
            return None
        same = {p for p, a in enumerate(stream.arguments[i]) if a is stream.outputs[i - 1]}
        places = same if places is None else places & same
    return min(places) if places else (0 if n_layers == 1 else None)


def _is_half(parts: Anatomy) -> bool:
    return any(p.dtype in (mx.float16, mx.bfloat16) for p in parts.embedding.parameters().values())
