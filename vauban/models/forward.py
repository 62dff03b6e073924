"""The forward pass that returns the residual stream, for right-padded rows of a batch.

Two paths give the same numbers. "manual" walks `model.layers` itself: embed, mask, blocks, norm,
head. "tap" runs the model's own forward with recording blocks, for every family that the loop does
not cover. Which one is used is decided once per model by `verify_forward`, and whether rows may be
padded, or start from a common cache, by `row_checks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from vauban._common import largest, probe_tokens
from vauban.errors import ArchitectureError, InputError
from vauban.interventions import Intervention, as_interventions, started
from vauban.models.anatomy import Anatomy, anatomy
from vauban.models.caches import described, repeated
from vauban.models.families import family_of
from vauban.models.notes import note, notes, warn_beyond_window
from vauban.models.parity import relative_difference, tolerance_for, verify_forward
from vauban.models.walk import Pass, by_hand, by_tap, norm_inputs, several_streams

Positions = Literal["last", "all"] | tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class ForwardOutput:
    """`logits` (B, T, V) or (B, 1, V) or None; `residual` (B, L+1, P, d) or None.

    residual r < L is the input of block r, after interventions at that site; residual L is the
    output of the last block, before the final norm.

    >>> import mlx.core as mx, vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> tokens = mx.array([vauban.encode_chat(tokenizer, "Hello")])
    >>> out = vauban.forward(model, tokens, logits="last")
    >>> out.logits.shape[1], out.residual.shape
    (1, (1, 7, 1, 128))
    """

    logits: mx.array | None
    residual: mx.array | None


@dataclass(frozen=True)
class BatchCheck:
    """Whether prompts of uneven length may share a batch on this model, and why not."""

    ok: bool
    reason: str


@dataclass(frozen=True)
class RowChecks:
    """What a model's rows may share, measured: the cache of a common prefix, a padded batch.

    The figures are the largest difference from single prompts, relative to the largest value; inf
    where it fails outright.
    """

    prefix: float
    padding: float
    tolerance: float

    @property
    def shares(self) -> bool:
        return self.prefix <= self.tolerance

    @property
    def pads(self) -> bool:
        return self.padding <= self.tolerance


def forward(
    model: nn.Module,
    tokens: mx.array,
    *,
    lengths: Sequence[int] | None = None,
    cache: list[Any] | None = None,
    positions: Positions = "last",
    interventions: Sequence[Intervention] = (),
    logits: bool | Literal["last"] | mx.array = True,
    streams: Literal["read", "all"] = "read",
) -> ForwardOutput:
    """Run `model` on right-padded `tokens` (B, T) and return logits and residuals.

    `lengths` (B,) counts each row's real tokens (default: all T). `positions`: "last", "all",
    None (no residuals), or a tuple of negative ints counted from each row's last real token.
    `cache`: a filled prompt cache of batch size B, updated in place; default a fresh one.
    `logits`: True for all positions, "last" for each row's last real token, False for none, or the
    columns (B, P) of each row where they are wanted.
    `streams`: where a model carries several streams (Gemma 3n, DeepSeek V4.1) "read" returns what
    the next block's norm reads, "all" the streams themselves, (B, L+1, P, S, d).

    Raises InputError for empty or mismatched input, positions beyond a prompt, token ids out of
    range and interventions of another width; ArchitectureError when no verified path exists.

    >>> import mlx.core as mx, vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> out = vauban.forward(model, mx.array([vauban.encode_chat(tokenizer, "Hello")]))
    >>> out.residual.shape[1] == len(model.layers) + 1
    True
    """
    parts = anatomy(model)
    interventions = as_interventions(interventions)
    columns = logits if isinstance(logits, mx.array) else None
    wanted: Any = "last" if columns is not None else logits
    if wanted not in (True, False, "last") or streams not in ("read", "all"):
        raise InputError(
            f"logits is {wanted!r}, streams {streams!r}; expected True, False or 'last', and "
            "'read' or 'all'"
        )
    rows, width = _check_tokens(tokens, parts)
    counts = _check_lengths(lengths, rows, width)
    index = _position_index(positions, counts, width)
    check = verify_forward(model)
    past = getattr(cache[0], "offset", 0) if cache else 0
    warn_beyond_window(model, max(counts) + (past if isinstance(past, int) else 0))
    if len(set(counts)) > 1 and not can_pad(model):
        if cache is not None or columns is not None:
            raise ArchitectureError(
                f"{family_of(model)} reads padded rows wrongly; give rows of one length with a "
                "cache, and where logits are wanted at columns"
            )
        options: dict[str, Any] = {"logits": logits, "streams": streams, "positions": positions}
        return _by_length(model, tokens, counts, interventions=interventions, **options)
    cache = _check_cache(model, cache, rows)
    several = several_streams(model)
    given = Pass(
        tokens=tokens,
        cache=cache,
        interventions=started(interventions, counts),
        record=index is not None,
        logits=wanted,
        last=mx.array([n - 1 for n in counts]) if columns is None else columns,
    )
    reading: AbstractContextManager[dict[int, mx.array]] = nullcontext({})
    with norm_inputs(parts) if several else reading as reads:
        out, residuals = (by_hand if check.path == "manual" else by_tap)(model, given)
    if index is None:
        return ForwardOutput(out, None)
    if several and streams == "read":
        residuals = [reads[r] for r in range(parts.n_layers + 1)]
    every = several and streams == "all"
    kept = [_at_positions(h, rows, index, all_streams=every) for h in residuals]
    return ForwardOutput(out, mx.stack(kept, axis=1))


def can_share(model: nn.Module) -> bool:
    """Whether the cache of a common prefix may be repeated over a batch; tried once per model."""
    return row_checks(model).shares


def can_pad(model: nn.Module) -> bool:
    """Whether shorter prompts may be padded on the right; tried once per model."""
    return row_checks(model).pads


def row_checks(model: nn.Module) -> RowChecks:
    """Try two prompts with a common start together and alone: residuals and logits of their ends.

    Whether a cache may be repeated over rows depends on what a family keeps in it and how its
    blocks read it, so it is run, not guessed.
    """
    known = notes(model).rows
    if known is not None:
        return known
    top = anatomy(model).vocabulary
    start = probe_tokens(13, top)
    ends = [probe_tokens(9, top, 1), probe_tokens(4, top, 2)]
    alone = [_ends(model, [start + end], None) for end in ends]
    expected = [mx.concatenate(list(values)) for values in zip(*alone, strict=True)]

    def difference(skip: int) -> float:
        cache = None
        try:
            if skip:
                cache = make_prompt_cache(model)
                forward(model, mx.array([start]), cache=cache, positions=None, logits=False)
                cache = repeated(cache, 2)
            together = _ends(model, [(start + end)[skip:] for end in ends], cache)
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, ArchitectureError):
            # A family that cannot do this with a batch gets its prompts in another way.
            return float("inf")
        return largest(map(relative_difference, together, expected))

    tolerance = tolerance_for(expected[0].dtype in (mx.float16, mx.bfloat16))
    # While it is tried, rows are padded and share a cache.
    note(model, rows=RowChecks(0.0, 0.0, tolerance))
    try:
        checks = RowChecks(difference(13), difference(0), tolerance)
    finally:
        note(model, rows=None)
    note(model, rows=checks)
    return checks


def _ends(
    model: nn.Module, rows: list[list[int]], cache: list[Any] | None
) -> tuple[mx.array, mx.array]:
    """Residuals and logits of each row's last token."""
    lengths = [len(row) for row in rows]
    padded = mx.array([row + [0] * (max(lengths) - len(row)) for row in rows])
    out = forward(model, padded, lengths=lengths, cache=cache, logits="last")
    assert out.residual is not None and out.logits is not None
    mx.eval(out.residual, out.logits)
    return out.residual, out.logits


def _by_length(
    model: nn.Module, tokens: mx.array, lengths: list[int], **options: Any
) -> ForwardOutput:
    """Rows of one length at a time, put back in their order; what lies past a row's end is 0."""
    order: list[int] = []
    outs: list[ForwardOutput] = []
    for length in sorted(set(lengths)):
        chosen = [i for i, n in enumerate(lengths) if n == length]
        order += chosen
        outs.append(forward(model, tokens[mx.array(chosen)][:, :length], **options))
    back = mx.argsort(mx.array(order))

    def joined(parts: list[mx.array | None], axis: int) -> mx.array | None:
        arrays = [part for part in parts if part is not None]
        if not arrays:
            return None
        longest = max(array.shape[axis] for array in arrays)
        return mx.concatenate([_padded(array, axis, longest) for array in arrays])[back]

    return ForwardOutput(
        joined([out.logits for out in outs], 1), joined([out.residual for out in outs], 2)
    )


def _padded(part: mx.array, axis: int, width: int) -> mx.array:
    return mx.pad(part, [(0, width - part.shape[i] if i == axis else 0) for i in range(part.ndim)])


def _at_positions(h: mx.array, rows: int, index: mx.array, *, all_streams: bool) -> mx.array:
    """(B, P, d) of a stream (B, T, d); (B, P, S, d) of several, (S, B, T, d) or (B, T, S, d)."""
    if all_streams and h.ndim == 4:
        if h.shape[0] != rows or h.shape[1] == rows:
            h = h.transpose(1, 2, 0, 3)
        return mx.take_along_axis(h, index[:, :, None, None], axis=1)
    if h.ndim != 3 or h.shape[0] != rows:
        raise ArchitectureError(
            f"the stream has shape {h.shape} between blocks; expected (batch, tokens, d)"
        )
    kept = mx.take_along_axis(h, index[:, :, None], axis=1)
    return kept[:, :, None] if all_streams else kept


def _check_tokens(tokens: mx.array, parts: Anatomy) -> tuple[int, int]:
    if tokens.ndim != 2 or tokens.size == 0:
        raise InputError(f"tokens have shape {tokens.shape}; expected (batch, length), not empty")
    if not mx.issubdtype(tokens.dtype, mx.integer):
        raise InputError(f"tokens are {tokens.dtype}; expected integer ids")
    check_ids(int(tokens.min()), int(tokens.max()), parts)
    return int(tokens.shape[0]), int(tokens.shape[1])


def check_ids(low: int, high: int, parts: Anatomy) -> None:
    """InputError for token ids outside the vocabulary: mlx would read past the embedding."""
    if low < 0 or high >= parts.vocabulary:
        raise InputError(
            f"token ids run from {low} to {high}; the vocabulary holds 0 to {parts.vocabulary - 1}"
        )


def _check_lengths(lengths: Sequence[int] | None, rows: int, width: int) -> list[int]:
    if lengths is None:
        return [width] * rows
    counts = [int(n) for n in lengths]
    if len(counts) != rows:
        raise InputError(f"{len(counts)} lengths for {rows} rows of tokens")
    if min(counts) < 1 or max(counts) > width:
        raise InputError(f"lengths {min(counts)} to {max(counts)}; expected 1 to {width}")
    return counts


def _check_cache(model: nn.Module, cache: list[Any] | None, rows: int) -> list[Any]:
    """`cache`, or a fresh one; it must be of this model's kinds and hold as many rows."""
    fresh = make_prompt_cache(model)
    if cache is None:
        return fresh
    given, expected = described(cache), described(fresh)
    if len(given) != len(expected):
        raise InputError(
            f"the cache has {len(given)} entries, {family_of(model)} needs {len(expected)}; "
            "was it made for another model?"
        )
    for i, (a, b) in enumerate(zip(given, expected, strict=True)):
        # mlx-lm's batched kinds stand for the plain ones.
        if a != b and a[0] != f"Batch{b[0]}":
            raise InputError(
                f"cache {i} is a {a[0]}, {family_of(model)} needs a {b[0]}; "
                "was it made for another model?"
            )
    keys = [getattr(state, "keys", None) for state in cache]
    others = {int(k.shape[0]) for k in keys if isinstance(k, mx.array)} - {rows}
    if others:
        raise InputError(f"the cache holds {max(others)} rows, the tokens have {rows}")
    return cache


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
