"""Prompts and a direction: projections, steering; two directions: cosine and angle."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from vauban.directions.geometry import unit
from vauban.errors import InputError
from vauban.evaluation import SurfaceScan, load_surface_prompts, scan_surface, surface_path
from vauban.generation import generate
from vauban.interventions import Project
from vauban.linalg import as_direction
from vauban.models import check_measured_on, forward
from vauban.prompts import encode_chat


@dataclass(frozen=True)
class Probe:
    """Projections of a prompt's last token on a unit direction, residual 0 to L.

    >>> Probe("Hello", (0.5, 3.0), 1).projections[1]
    3.0
    """

    prompt: str
    projections: tuple[float, ...]
    residual_index: int | None
    """The residual the direction was measured at, where the direction says so."""

    def summary(self) -> str:
        marked = [
            f"{value:+.2f}{'*' if index == self.residual_index else ''}"
            for index, value in enumerate(self.projections)
        ]
        return f"{self.prompt!r} along the direction, residual 0 on: {' '.join(marked)}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Scan:
    """Projections of every token of a text on a unit direction at one residual.

    >>> scan = Scan(("Rob", " a", " shop"), (4.0, 0.5, 9.0), 4)
    >>> max(zip(scan.projections, scan.tokens, strict=True))[1]
    ' shop'
    """

    tokens: tuple[str, ...]
    projections: tuple[float, ...]
    residual_index: int

    def summary(self) -> str:
        parts = [
            f"{token!r} {value:+.2f}"
            for token, value in zip(self.tokens, self.projections, strict=True)
        ]
        return f"residual {self.residual_index}: " + ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Two directions: their cosine and the angle between them in degrees.

    >>> import mlx.core as mx
    >>> round(compare(mx.array([1.0, 0.0]), mx.array([0.0, 2.0])).degrees, 4)
    90.0
    """

    cosine: float
    degrees: float

    def summary(self) -> str:
        return f"cosine {self.cosine:.4f}, angle {self.degrees:.1f}°"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def probe_prompt(model: Any, tokenizer: Any, prompt: str, direction: Any) -> Probe:
    """Project the last token of a prompt on a direction, at every residual.

    Args:
        prompt: a user message; the chat template is applied.
        direction: a DirectionResult or an array (d,); only its orientation counts.

    Raises:
        InputError: an empty prompt, or a direction that does not fit the model.

    >>> import mlx.core as mx
    >>> from vauban import organism_path, quick
    >>> model, tokenizer = quick.load(organism_path("dense"))
    >>> len(probe_prompt(model, tokenizer, "Hello", mx.ones(128)).projections)
    7
    """
    check_measured_on(direction, model, tokenizer)
    residual = _residual(model, encode_chat(tokenizer, prompt), "last")
    along = _along(residual[0, :, 0, :], direction)
    return Probe(prompt, tuple(along), getattr(direction, "residual_index", None))


def scan(
    model: Any,
    tokenizer: Any,
    direction: Any,
    direction_layer: Any = None,
    layer: int | None = None,
) -> SurfaceScan | Scan:
    """The refusal surface along a direction: the rows that the model's folder names, else the
    bundled ones, answered and projected (`vauban.scan_surface`).

    `scan(model, tokenizer, text, direction, layer)` is `scan_tokens`.

    Args:
        direction: a DirectionResult or an array (d,).
        direction_layer: for an array, the block whose output is looked at.

    Raises:
        InputError: a raw array without `direction_layer`, or a layer the model does not have.

    >>> import mlx.core as mx
    >>> from vauban import organism_path, quick
    >>> model, tokenizer = quick.load(organism_path("dense"))
    >>> scan(model, tokenizer, "Hello", mx.ones(128), 3).residual_index
    4
    """
    if isinstance(direction, str):
        return scan_tokens(model, tokenizer, direction, direction_layer, layer)
    rows = load_surface_prompts(surface_path(getattr(tokenizer, "name_or_path", None)))
    return scan_surface(model, tokenizer, direction, rows, layer=direction_layer)


def scan_tokens(
    model: Any, tokenizer: Any, text: str, direction: Any, direction_layer: int | None = None
) -> Scan:
    """Project every token of a prompt on a direction at one residual.

    Args:
        text: a user message; the chat template is applied and its tokens are shown too.
        direction_layer: the block whose output is looked at; taken from a result object.

    Raises:
        InputError: a raw array without `direction_layer`, or a layer the model does not have.

    >>> import mlx.core as mx
    >>> from vauban import organism_path, quick
    >>> model, tokenizer = quick.load(organism_path("dense"))
    >>> found = scan_tokens(model, tokenizer, "Hello", mx.ones(128), direction_layer=3)
    >>> len(found.tokens) == len(found.projections)
    True
    """
    if direction_layer is None:
        direction_layer = getattr(direction, "layer_index", None)
    if direction_layer is None:
        raise InputError("a raw direction does not say its layer; pass direction_layer=<block>.")
    check_measured_on(direction, model, tokenizer)
    tokens = encode_chat(tokenizer, text)
    residual = _residual(model, tokens, "all")
    blocks = residual.shape[1] - 1
    if not 0 <= direction_layer < blocks:
        raise InputError(
            f"direction_layer {direction_layer}: the model has blocks 0 to {blocks - 1}."
        )
    # Block i's output is residual i + 1.
    index = direction_layer + 1
    along = _along(residual[0, index], direction)
    shown = tuple(tokenizer.decode([token]) for token in tokens)
    return Scan(shown, tuple(along), index)


def steer_prompt(
    model: Any,
    tokenizer: Any,
    prompt: str,
    direction: Any,
    alpha: float = 1.0,
    max_tokens: int = 100,
) -> str:
    """The greedy answer to a prompt while the direction is taken out of the residual stream.

    Args:
        alpha: h ← h − α d(dᵀh) at every layer and token: 1 takes the direction out, 2 reflects
            it, 0 changes nothing, a negative value strengthens it.

    >>> import mlx.core as mx
    >>> from vauban import organism_path, quick
    >>> model, tokenizer = quick.load(organism_path("dense"))
    >>> text = steer_prompt(model, tokenizer, "Name a colour.", mx.ones(128), max_tokens=4)
    >>> isinstance(text, str)
    True
    """
    check_measured_on(direction, model, tokenizer)
    steering = (Project(as_direction(direction, "steer_prompt"), alpha),)
    return generate(model, tokenizer, [prompt], max_tokens=max_tokens, interventions=steering)[0]


def compare(dir_a: Any, dir_b: Any) -> Comparison:
    """Cosine and angle of two directions, each a result object or an array (d,).

    Raises:
        InputError: a zero or non-finite direction, or two different lengths.

    >>> compare(mx.array([1.0, 0.0]), mx.array([1.0, 1.0])).summary()
    'cosine 0.7071, angle 45.0°'
    """
    a, b = unit(dir_a, "the first direction"), unit(dir_b, "the second direction")
    if a.shape != b.shape:
        raise InputError(
            f"the directions have {a.size} and {b.size} components; expected the same model width"
        )
    cosine = float(np.clip(a @ b, -1.0, 1.0))
    return Comparison(cosine, math.degrees(math.acos(cosine)))


def _residual(model: Any, tokens: Sequence[int], positions: Any) -> mx.array:
    """The residuals (1, L+1, P, d) of one token list."""
    out = forward(model, mx.array([list(tokens)]), positions=positions, logits=False)
    assert out.residual is not None  # because `positions` is not None
    return out.residual


def _along(residuals: mx.array, direction: Any) -> list[float]:
    """Projections of (n, d) on the unit direction, in float32."""
    d = as_direction(direction, "probe", int(residuals.shape[-1]))
    return np.array(residuals.astype(mx.float32) @ d).tolist()
