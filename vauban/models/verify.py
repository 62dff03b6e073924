"""Proof of the forward pass: vauban's two paths against the model's own, once per loaded model.

Decides which path is used, finds what the explicit loop must know about the blocks, and refuses a
model on which neither path agrees. Knows models; judges no numbers but their agreement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.models.cache import make_prompt_cache

from vauban.errors import ArchitectureError
from vauban.models.anatomy import Anatomy, anatomy, is_half
from vauban.models.caches import copied, held, stretched
from vauban.models.families import family_of
from vauban.models.loading import device_info
from vauban.models.notes import note, notes
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


@dataclass(frozen=True, eq=False)
class _Prompt:
    """Tokens to read on top of `cache`, and what the model itself puts out for them."""

    tokens: mx.array
    cache: list[Any]
    logits: mx.array
    ruled_out: mx.array


# Residuals of every prompt that was checked.
_Residuals = list[list[mx.array]]
# A check with the residuals that go with it, None where the path disagrees.
_Attempt = tuple[ForwardCheck, _Residuals] | None


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


def _reference(model: nn.Module, tokens: mx.array, cache: list[Any]) -> tuple[mx.array, mx.array]:
    """The model's own logits in float32, and where it rules a token out for good (Phi-3 small).

    Ruled-out entries count as 0. Raises ArchitectureError where the model's own forward fails.
    """
    family = family_of(model)
    try:
        logits = model(tokens, cache=cache)
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


# A window up to here is exceeded by reading as many tokens; past it the check starts from caches
# that are filled to the window's edge, as long as they stay below this size.
_LONGEST_READ = 2100
_LARGEST_CACHE = 4 * 2**30
_WIDTH = 48


def _prompts(model: nn.Module, parts: Anatomy) -> tuple[list[_Prompt], int, list[str], bool]:
    """What is read for the check, its longest length, notes, and whether it exceeds the window."""
    window = window_of(make_prompt_cache(model))
    long = window + 9 > _LONGEST_READ
    width = _WIDTH if long else max(_WIDTH, window + 9)
    learned = getattr(getattr(model, "args", None), "n_positions", None)
    if isinstance(learned, int):
        # Learned positions end: past them GPT-2's kind reads beyond its table.
        width = min(width, learned)
    # A fixed walk through the vocabulary: every run checks the same tokens.
    walk = (mx.arange(2 * width)[None] * 7919 + 13) % min(parts.vocabulary, 50_000)
    cache = make_prompt_cache(model)
    tokens = walk[:, :width]
    prompts = [_Prompt(tokens, make_prompt_cache(model), *_reference(model, tokens, cache))]
    if not long:
        return prompts, width, [], True
    size = sum(array.nbytes for array in held(cache)) * window // width
    # The filled caches, a copy that is read, and what the blocks make of it.
    if size > min(_LARGEST_CACHE, device_info().memory_available // 4):
        note = (
            f"its window of {window} is longer than the check (caches of {size / 2**30:.1f} GiB), "
            "so the tap is used"
        )
        return prompts, width, [note], False
    # Half of the tokens lie before the window's edge, half behind it.
    edge = stretched(cache, window - width // 2)
    tokens = walk[:, width:]
    prompts.append(_Prompt(tokens, edge, *_reference(model, tokens, copied(edge))))
    length = window + width - width // 2
    note = f"keys and values of the first {window - width // 2} positions are repeated ones"
    return prompts, length, [note], True


def verify_forward(model: nn.Module) -> ForwardCheck:
    """Compare vauban's forward with `model(tokens)`, once per loaded model.

    The prompt is longer than any sliding window. One up to 2048 tokens is read in full; for a
    longer one 48 tokens are read fresh, and 48 more across the window's edge, on caches whose
    earlier keys and values repeat the first ones'. Only where such caches would take more than
    4 GiB, or a quarter of the free memory, is the window not reached; then the tap, which is the
    model's own forward, is used whatever the loop would give, and the note says so. Logits
    must agree to 1e-4 of the largest one (2e-2 in half precision), and the explicit loop's
    residuals with those that the tap records. On agreement the explicit loop is used, else the
    tap, which is compared in the same way. Raises ArchitectureError when neither agrees or the
    model puts out NaN.
    """
    known = notes(model).check
    if known is not None:
        return known
    parts = anatomy(model)
    prompts, length, remarks, crossed = _prompts(model, parts)
    tolerance = 2e-2 if is_half(parts) else 1e-4
    stream = Stream(recording=True)
    tried: list[str] = []

    def attempt(
        path: Literal["manual", "tap"], runs: Sequence[Callable[..., Any]], against: _Residuals
    ) -> _Attempt:
        """(check, residuals) when every prompt's run agrees with its reference, else None."""
        kept: _Residuals = []
        largest = 0.0
        for prompt, run, others in zip(prompts, runs, against or [[]] * len(prompts), strict=True):
            try:
                difference, worst, residuals = _compare(model, parts, prompt, run, others)
            except (TypeError, ValueError, AttributeError, KeyError, ArchitectureError) as error:
                # A family that this path cannot walk; the note says why, the other path is tried.
                tried.append(f"{path}: {str(error).splitlines()[0]}")
                return None
            scale = max(float(mx.abs(prompt.logits).max()), 1e-6)
            # Written so that NaN disagrees too.
            if not (difference <= tolerance * scale and worst <= tolerance):
                tried.append(f"{path}: logits differ by {difference:.1e}, residuals by {worst:.1e}")
                return None
            kept.append(residuals)
            largest = max(largest, difference)
        return ForwardCheck(True, largest, path, family_of(model), length), kept

    def taps() -> list[Callable[..., Any]]:
        first: Callable[..., Any] = partial(by_tap, stream=stream)
        return [first, by_tap][: len(prompts)]

    tap = attempt("tap", taps(), [])
    place = _find_place(stream, parts.n_layers)
    if place:
        # The stream is not the blocks' first argument: what was recorded was something else.
        note(model, place=place)
        stream = Stream(recording=True)
        tried.clear()
        tap = attempt("tap", taps(), [])
    elif place is None and stream.rounds == 1:
        remarks.append(
            "the trunk changes the stream between blocks; residuals are what blocks read"
        )
    if stream.rounds > 1:
        remarks.append(f"{stream.rounds} rounds over the blocks; residuals are the last round's")
    note(model, extras=tuple(stream.extras.get(i, 0) for i in range(parts.n_layers)))
    # The loop is trusted with a window only where it was seen to cross one.
    hand = attempt("manual", [by_hand] * len(prompts), tap[1] if tap else []) if crossed else None
    found = hand or tap
    if found is None:
        raise ArchitectureError(
            f"no forward pass of vauban agrees with {family_of(model)}'s own: {'; '.join(tried)}"
        )
    if hand is None and crossed:
        remarks.append(f"{tried[-1]}, so the tap is used")
    several = any(h.ndim == 4 for residuals in found[1] for h in residuals)
    check = replace(found[0], note="; ".join(remarks))
    note(model, check=check, several_streams=several)
    return check


def _compare(
    model: nn.Module,
    parts: Anatomy,
    prompt: _Prompt,
    run: Callable[..., Any],
    against: list[mx.array],
) -> tuple[float, float, list[mx.array]]:
    """Largest difference of the logits, of the residuals (relative), and the residuals."""
    last = mx.array([prompt.tokens.shape[1] - 1])
    cache = copied(prompt.cache)
    got, residuals = run(model, parts, prompt.tokens, cache, (), True, True, last)
    got = mx.where(prompt.ruled_out & (got < 0), 0, got.astype(mx.float32))
    worst = max(
        (
            float(mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max())
            / max(float(mx.abs(b.astype(mx.float32)).max()), 1e-6)
            for a, b in zip(residuals, against, strict=bool(against))
        ),
        default=0.0,
    )
    return float(mx.abs(got - prompt.logits).max()), worst, residuals


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
