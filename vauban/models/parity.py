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

from vauban._common import largest, probe_tokens
from vauban.errors import ArchitectureError
from vauban.models.anatomy import Anatomy, anatomy, is_half
from vauban.models.caches import arrays_in, copied, stretched
from vauban.models.families import family_of
from vauban.models.info import device_info
from vauban.models.notes import note, notes
from vauban.models.taps import Place, Stream
from vauban.models.walk import Pass, Run, by_hand, by_tap

# Relative to the largest value compared: rounding of another order of the same operations.
_TOLERANCE, _HALF_TOLERANCE = 1e-4, 2e-2
# A window up to here is exceeded by reading as many tokens; past it the check starts from caches
# that are filled to the window's edge, as long as they stay below this size.
_LONGEST_READ = 2100
_LARGEST_CACHE = 4 * 2**30
_WIDTH = 48


@dataclass(frozen=True)
class ForwardCheck:
    """Result of `verify_forward`: largest |difference| of logits, relative to the largest logit.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> check = vauban.verify_forward(model)
    >>> check.ok, check.path, check.max_difference < 1e-4
    (True, 'manual', True)
    """

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


def tolerance_for(half: bool) -> float:
    """The relative difference up to which two computations of one model agree."""
    return _HALF_TOLERANCE if half else _TOLERANCE


def relative_difference(a: mx.array, b: mx.array) -> float:
    """Largest |a - b| relative to the largest |b|; entries ruled out as -inf in both count as 0."""
    ruled_out = (a == -mx.inf) & (b == -mx.inf)
    a, b = (mx.where(ruled_out, 0, x).astype(mx.float32) for x in (a, b))
    return float(mx.abs(a - b).max() / mx.maximum(mx.abs(b).max(), 1e-6))


def verify_forward(model: nn.Module) -> ForwardCheck:
    """Compare vauban's forward with `model(tokens)`, once per loaded model.

    The prompt is longer than any sliding window. A window of up to 2048 tokens is read in full. For
    a longer one 48 tokens are read fresh, and 48 more across the window's edge, on caches whose
    earlier keys and values repeat the first ones'. Where such caches would take more than 4 GiB, or
    a quarter of the machine's memory, the window is not reached: the tap, which is the model's own
    forward, is then used whatever the loop would give, and the note says so.

    Logits must agree to 1e-4 of the largest one (2e-2 in half precision), and the explicit loop's
    residuals with those that the tap records. On agreement the explicit loop is used, else the
    tap, which is compared in the same way. Raises ArchitectureError when neither agrees or the
    model puts out NaN.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> verify_forward(model).family
    'qwen3'
    """
    known = notes(model).check
    if known is not None:
        return known
    parts = anatomy(model)
    prompts, length, remarks, crossed = _prompts(model, parts)
    tolerance = tolerance_for(is_half(parts))
    stream = Stream(recording=True)
    failures: list[str] = []

    def attempt(path: Literal["manual", "tap"], against: _Residuals) -> _Attempt:
        """The check and the residuals when every prompt's run agrees with its reference."""
        kept: _Residuals = []
        worst = 0.0
        for index, prompt in enumerate(prompts):
            # The first prompt's stream shows how the blocks are called.
            tap = by_tap if index else partial(by_tap, stream=stream)
            expected = against[index] if against else []
            try:
                run = by_hand if path == "manual" else tap
                difference, apart, residuals = _compare(model, prompt, run, expected)
            except (TypeError, ValueError, AttributeError, KeyError, ArchitectureError) as error:
                # A family that this path cannot walk; the note says why, the other path is tried.
                failures.append(f"{path}: {str(error).splitlines()[0]}")
                return None
            scale = max(float(mx.abs(prompt.logits).max()), 1e-6)
            # Written so that NaN disagrees too.
            if not (difference <= tolerance * scale and apart <= tolerance):
                failures.append(
                    f"{path}: logits differ by {difference:.1e}, residuals by {apart:.1e}"
                )
                return None
            kept.append(residuals)
            worst = max(worst, difference)
        return ForwardCheck(True, worst, path, family_of(model), length), kept

    tap = attempt("tap", [])
    place = _find_place(stream, parts.n_layers)
    if place:
        # The stream is not the blocks' first argument: what was recorded was something else.
        note(model, place=place)
        stream = Stream(recording=True)
        failures.clear()
        tap = attempt("tap", [])
    elif place is None and stream.rounds == 1:
        remarks.append(
            "the trunk changes the stream between blocks; residuals are what blocks read"
        )
    if stream.rounds > 1:
        remarks.append(f"{stream.rounds} rounds over the blocks; residuals are the last round's")
    note(model, extras=tuple(stream.extras.get(i, 0) for i in range(parts.n_layers)))
    # The loop is trusted with a window only where it was seen to cross one.
    loop = attempt("manual", tap[1] if tap else []) if crossed else None
    agreed = loop or tap
    if agreed is None:
        raise ArchitectureError(
            f"no forward pass of vauban agrees with {family_of(model)}'s own: {'; '.join(failures)}"
        )
    if loop is None and crossed:
        remarks.append(f"{failures[-1]}, so the tap is used")
    check = replace(agreed[0], note="; ".join(remarks))
    several = any(h.ndim == 4 for residuals in agreed[1] for h in residuals)
    note(model, check=check, several_streams=several)
    return check


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


def _prompts(model: nn.Module, parts: Anatomy) -> tuple[list[_Prompt], int, list[str], bool]:
    """What is read for the check, its length, remarks, and whether it exceeds the window."""
    window = window_of(make_prompt_cache(model))
    long = window + 9 > _LONGEST_READ
    width = _WIDTH if long else max(_WIDTH, window + 9)
    learned = getattr(getattr(model, "args", None), "n_positions", None)
    if isinstance(learned, int):
        # Learned positions end: past them GPT-2's kind reads beyond its table.
        width = min(width, learned)
    ids = mx.array([probe_tokens(2 * width, parts.vocabulary)])
    cache = make_prompt_cache(model)
    tokens = ids[:, :width]
    prompts = [_Prompt(tokens, make_prompt_cache(model), *_reference(model, tokens, cache))]
    if not long:
        return prompts, width, [], True
    size = sum(array.nbytes for array in arrays_in(cache)) * window // width
    # The filled caches, a copy that is read, and what the blocks make of it.
    if size > min(_LARGEST_CACHE, device_info().memory_total // 4):
        remark = (
            f"its window of {window} is longer than the check (caches of {size / 2**30:.1f} GiB), "
            "so the tap is used"
        )
        return prompts, width, [remark], False
    # Half of the tokens lie before the window's edge, half behind it.
    edge = stretched(cache, window - width // 2)
    tokens = ids[:, width:]
    prompts.append(_Prompt(tokens, edge, *_reference(model, tokens, copied(edge))))
    length = window + width - width // 2
    remark = f"keys and values of the first {window - width // 2} positions are repeated ones"
    return prompts, length, [remark], True


def _compare(
    model: nn.Module,
    prompt: _Prompt,
    run: Callable[[nn.Module, Pass], Run],
    against: list[mx.array],
) -> tuple[float, float, list[mx.array]]:
    """Largest difference of the logits, of the residuals (relative), and the residuals."""
    logits, residuals = run(model, Pass(prompt.tokens, copied(prompt.cache)))
    assert logits is not None
    logits = mx.where(prompt.ruled_out & (logits < 0), 0, logits.astype(mx.float32))
    apart = largest(
        relative_difference(a, b) for a, b in zip(residuals, against, strict=bool(against))
    )
    return float(mx.abs(logits - prompt.logits).max()), apart, residuals


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
