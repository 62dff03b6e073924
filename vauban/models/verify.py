"""Proof of the forward pass: vauban's two paths against the model's own, once per loaded model.

Decides which path is used, finds what the explicit loop must know about the blocks, and refuses a
model on which neither path agrees. Knows models; judges no numbers but their agreement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.models.cache import make_prompt_cache

from vauban.errors import ArchitectureError
from vauban.models.anatomy import anatomy, is_half
from vauban.models.families import BLOCKS_NOT_CALLED, family_of
from vauban.models.paths import by_hand, by_tap
from vauban.models.taps import Stream
from vauban.models.walk import Place


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


# A check with the residuals that go with it, None where the path disagrees.
_Attempt = tuple[ForwardCheck, list[mx.array]] | None


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


def _reference(model: nn.Module, tokens: mx.array) -> tuple[mx.array, mx.array]:
    """The model's own logits in float32, and where it rules a token out for good (Phi-3 small).

    Ruled-out entries count as 0. Raises ArchitectureError where the model's own forward fails.
    """
    family = family_of(model)
    try:
        logits = model(tokens, cache=make_prompt_cache(model))
        mx.eval(logits)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        if "metal" in str(error).lower():
            raise ArchitectureError(
                f"{family} runs on kernels that need Metal; this machine has none"
            ) from error
        raise ArchitectureError(
            f"{family}'s own forward pass fails in mlx-lm {mlx_lm.__version__}: {error}"
        ) from error
    if not isinstance(logits, mx.array):
        raise ArchitectureError(f"{family} returns a {type(logits).__name__} instead of logits")
    logits = logits.astype(mx.float32)
    ruled_out = mx.broadcast_to((logits == -mx.inf).all(axis=(0, 1)), logits.shape)
    logits = mx.where(ruled_out, 0, logits)
    if not bool(mx.isfinite(logits).all()):
        raise ArchitectureError(
            f"{family} puts out NaN or inf on plain tokens; its weights are broken"
        )
    return logits, ruled_out


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
    reference, ruled_out = _reference(model, tokens)
    scale = float(mx.abs(reference).max())
    half = is_half(parts)
    tolerance = 2e-2 if half else 1e-4
    last = mx.array([width - 1])
    stream = Stream(recording=True)
    tried: list[str] = []

    def attempt(path: Literal["manual", "tap"], run: Any, against: list[mx.array]) -> _Attempt:
        """(check, residuals) when `run` agrees with the reference, else None and a note."""
        try:
            got, residuals = run(
                model, parts, tokens, make_prompt_cache(model), (), True, True, last
            )
            got = mx.where(ruled_out & (got < 0), 0, got.astype(mx.float32))
            difference = float(mx.abs(got - reference).max())
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
        # Written so that NaN disagrees too.
        if not (difference <= tolerance * max(scale, 1e-6) and worst <= tolerance):
            tried.append(f"{path}: logits differ by {difference:.1e}, residuals by {worst:.1e}")
            return None
        return ForwardCheck(True, difference, path, family_of(model), width), residuals

    object.__setattr__(model, "_vauban_blocks_run", family_of(model) not in BLOCKS_NOT_CALLED)
    tap = attempt("tap", partial(by_tap, stream=stream), [])
    place = _find_place(stream, parts.n_layers)
    if place:
        # The stream is not the blocks' first argument: what was recorded was something else.
        object.__setattr__(model, "_vauban_place", place)
        stream = Stream(recording=True)
        tried.clear()
        tap = attempt("tap", partial(by_tap, stream=stream), [])
    elif place is None and stream.rounds == 1:
        notes.append("the trunk changes the stream between blocks; residuals are what blocks read")
    if stream.rounds > 1:
        notes.append(f"{stream.rounds} rounds over the blocks; residuals are the last round's")
    extras = [stream.extras.get(i, 0) for i in range(parts.n_layers)]
    object.__setattr__(model, "_vauban_extras", extras)
    hand = attempt("manual", by_hand, tap[1] if tap else [])
    found = hand or tap
    if found is None:
        raise ArchitectureError(
            f"no forward pass of vauban agrees with {family_of(model)}'s own: {'; '.join(tried)}"
        )
    if hand is None:
        notes.append(f"{tried[-1]}, so the tap is used")
    several = any(h.ndim == 4 for h in found[1])
    object.__setattr__(model, "_vauban_several", several)
    check = replace(found[0], note="; ".join(notes))
    object.__setattr__(model, "_vauban_check", check)
    return check


def _find_place(stream: Stream, n_layers: int) -> Place | None:
    """The argument of every block that is the output of the block before; None when there is none.

    Most blocks take the stream first; talkie's take the embedding first and the stream second,
    GPT-J's take it by name.
    """
    places = None
    for i in range(1, n_layers):
        if i not in stream.arguments or i - 1 not in stream.outputs:
            return None
        same = {p for p, a in stream.arguments[i].items() if a is stream.outputs[i - 1]}
        places = same if places is None else places & same
    return min(places, key=str) if places else (0 if n_layers == 1 else None)
