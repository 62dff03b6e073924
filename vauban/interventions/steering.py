"""Putting something into the stream: activation addition, patching, and steering under a condition.

`layer` is a RESIDUAL index throughout: r is the input of block r, n_layers the output of the last
block. Knows arrays and the lengths of prompts; knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import mlx.core as mx
import numpy as np

from vauban.errors import InputError, ModelError
from vauban.interventions.module_changes import ModuleOutputs, ModuleWeights
from vauban.interventions.protocol import (
    Change,
    Checked,
    Intervention,
    check_width,
    indices,
    number,
    residual,
    residuals,
    started,
)
from vauban.linalg import as_direction, as_rows, as_vector

Positions = Literal["all", "prompt"]


def _add_positions(given: Any, owner: str) -> str:
    if given not in ("all", "prompt"):
        raise InputError(f"{owner}: positions is {given!r}; expected 'all' or 'prompt'")
    return given


@dataclass(frozen=True, eq=False)
class Add(Checked):
    """Activation addition h <- h + scale · v at one residual (Arditi et al. 2024, eq. 3).

    `direction` (d,), or a result that holds one, is used as given, not normalised. `positions`
    "all" adds at every token in prefill and decoding, "prompt" only while the prompt is read.

    >>> import mlx.core as mx
    >>> add = Add(mx.array([1.0, 0.0]), 2.0, layer=3)
    >>> add.change("block_input", 3, 4, True)(mx.array([[5.0, 7.0]])).tolist()
    [[7.0, 7.0]]
    """

    direction: Annotated[Any, as_vector]
    scale: Annotated[float, number("scale")]
    layer: Annotated[int, residual]
    positions: Annotated[Positions, _add_positions] = "all"

    @classmethod
    def from_result(cls, result: Any, k: float, positions: Positions = "all") -> Add:
        """k times the raw (unnormalised) difference of a `DirectionResult`, at its own residual."""
        raw = result.direction * result.norms[result.layer_index]
        return cls(raw, k, result.residual_index, positions)

    @classmethod
    def from_classifier(
        cls, classifier: Any, result: Any, k: float, positions: Positions = "all"
    ) -> Add:
        """k · |v| along a classifier's weights, v the raw difference of a `DirectionResult`.

        Weights have a scale of their own, so that only this makes steering with them comparable
        to `from_result`. `classifier` is a fitted `Direction` or an array (d,), measured at the
        residual of `result`; its sign is the classifier's (harmful scores higher).
        """
        unit = as_direction(classifier, "Add: classifier", int(result.direction.size))
        return cls(unit * result.norms[result.layer_index], k, result.residual_index, positions)

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Change | None:
        if not residuals(self.layer, "Add").covers(layer, n_layers) or site != "block_input":
            return None
        if self.positions == "prompt" and not prefill:
            return None
        step = self.scale * self.direction
        return lambda h: (h.astype(mx.float32) + step).astype(h.dtype)


def _patch_rows(value: Any, owner: str) -> mx.array:
    return mx.array(as_rows(value, owner).astype(np.float32))


def _patch_positions(given: Any, owner: str) -> tuple[int, ...]:
    listed = indices(given, f"{owner}: positions", "an int or a list of ints")
    if not listed:
        raise InputError(f"{owner}: positions is empty; name at least one token")
    return listed


@dataclass(frozen=True, eq=False)
class Patch(Checked):
    """Activation patching: the stream at chosen tokens of a prompt is replaced by given vectors.

    Residual `layer` becomes values[p] at positions[p] of every prompt, while the prompt is read;
    decoded tokens are left alone (Meng et al. 2022, arXiv 2202.05262; Zhang and Nanda 2023,
    arXiv 2309.16042). `values` is (d,) or (P, d), in the order of `positions`; one vector serves
    all positions. `positions` is one int or several: 0, 1, ... count from a prompt's first token
    (the template's tokens count too), -1, -2, ... from its last.

    Raises InputError for a position beyond a prompt, or two that name one token of it.

    >>> import mlx.core as mx, vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> clean, corrupted = (
    ...     mx.array([vauban.encode_chat(tokenizer, text)]) for text in ("Hello", "Name a river")
    ... )
    >>> vector = vauban.forward(model, clean).residual[0, 3, 0]
    >>> patched = vauban.forward(model, corrupted, interventions=[Patch(vector, 3, -1)])
    >>> bool(mx.allclose(patched.residual[0, 3, 0], vector))
    True
    """

    values: Annotated[Any, _patch_rows]
    layer: Annotated[int, residual]
    positions: Annotated[Any, _patch_positions]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.values.shape[0] not in (1, len(self.positions)):
            raise InputError(
                f"Patch: {self.values.shape[0]} vectors for {len(self.positions)} positions; "
                "expected one for each, or one for all"
            )

    def start(self, lengths: Sequence[int]) -> Intervention:
        """The patch of a batch whose rows have these lengths."""
        return _PatchRun(self, mx.array([self._columns(i, int(n)) for i, n in enumerate(lengths)]))

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Change | None:
        raise InputError(_NOT_STARTED.format("Patch"))

    def _columns(self, row: int, length: int) -> list[int]:
        columns = [p if p >= 0 else length + p for p in self.positions]
        for position, column in zip(self.positions, columns, strict=True):
            if not 0 <= column < length:
                raise InputError(
                    f"Patch: position {position} lies beyond row {row}, a prompt of {length} tokens"
                )
        if len(set(columns)) < len(columns):
            raise InputError(
                f"Patch: positions {self.positions} name a token of row {row} twice "
                f"({length} tokens)"
            )
        return columns


_NOT_STARTED = (
    "{} depends on whole prompts; pass it to forward, generate or collect_activations, "
    "which start it (vauban.interventions.started)"
)


@dataclass(frozen=True, eq=False)
class _PatchRun:
    """A `Patch` on one batch: `columns` (B, P) says where each row's vectors go."""

    value: Patch
    columns: mx.array

    @property
    def width(self) -> int:
        return self.value.width

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Change | None:
        patched = residuals(self.value.layer, "Patch").covers(layer, n_layers)
        if not patched or site != "block_input" or not prefill:
            return None

        def patch(h: mx.array) -> mx.array:
            _check_stream(h, self.columns.shape[0], "Patch")
            hit = mx.arange(h.shape[1])[None, :, None] == self.columns[:, None, :]
            rows = mx.broadcast_to(self.value.values, (hit.shape[2], h.shape[2]))
            values = (hit.astype(mx.float32) @ rows).astype(h.dtype)
            return mx.where(hit.any(axis=-1, keepdims=True), values, h)

        return patch


def _check_stream(h: mx.array, rows: int, owner: str) -> None:
    """InputError unless h is one stream (B, T, d): else tokens could not be told apart."""
    if h.ndim != 3 or h.shape[0] != rows:
        raise InputError(
            f"{owner}: the stream has shape {h.shape} between blocks; expected ({rows}, tokens, d)"
        )


@dataclass(frozen=True, eq=False)
class Conditional(Checked):
    """`intervention` for the prompts whose mean residual points along a condition direction.

    Conditional steering (CAST, Lee et al. 2024, arXiv 2409.05907). In prefill the cosine of each
    row's mean residual at `layer` (over its real tokens) with `condition_direction` (d,) is
    compared with `threshold`, > with `above`, else <=. Rows that meet it are changed from that
    residual on, all tokens, and at every site while decoding; the others are left exactly as they
    are. `forward` takes the tokens it is given as the prompt.

    >>> import mlx.core as mx
    >>> addition = Add(mx.array([0.0, 9.0]), 1.0, layer=0)
    >>> only = Conditional(mx.array([1.0, 0.0]), 0.5, addition, layer=0)
    >>> prompts = mx.array([[[1.0, 0.0]], [[0.0, 1.0]]])  # two of one token: along it, across it
    >>> only.start([1, 1]).change("block_input", 0, 4, True)(prompts).tolist()
    [[[1.0, 9.0]], [[0.0, 1.0]]]
    """

    condition_direction: Annotated[Any, as_direction]
    threshold: Annotated[float, number("threshold")]
    intervention: Intervention
    layer: Annotated[int, residual] = field(kw_only=True)
    above: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        inner = self.intervention
        if not -1.0 <= self.threshold <= 1.0:
            raise InputError(
                f"Conditional: threshold is {self.threshold}; a cosine lies in [-1, 1]"
            )
        if isinstance(inner, Conditional | ModuleOutputs | ModuleWeights):
            raise InputError(
                f"Conditional: {type(inner).__name__} cannot be switched row by row; "
                "use an intervention on the stream"
            )
        check_width([inner], self.width)

    def start(self, lengths: Sequence[int]) -> Intervention:
        """The state of one run over rows of these lengths."""
        return _ConditionalRun(self, lengths)

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Change | None:
        raise InputError(_NOT_STARTED.format("Conditional"))


class _ConditionalRun:
    """One run of a `Conditional`: `decision` (B,) bool once the prompt has been read."""

    def __init__(self, value: Conditional, lengths: Sequence[int]) -> None:
        self.value = value
        self.width = value.width
        self.lengths = list(lengths)
        self.inner = started([value.intervention], lengths)[0]
        self.decision: mx.array | None = None

    def filter(self, rows: mx.array) -> None:
        """Keep the decisions of these rows; the others have finished."""
        if self.decision is not None:
            self.decision = self.decision[rows]
        if hasattr(self.inner, "filter"):
            self.inner.filter(rows)

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Change | None:
        at_condition = residuals(self.value.layer, "Conditional").covers(layer, n_layers)
        deciding = at_condition and prefill and site == "block_input"
        step = self.inner.change(site, layer, n_layers, prefill)
        if prefill and layer < self.value.layer:
            return None
        if not deciding and step is None:
            return None

        def run(h: mx.array) -> mx.array:
            if deciding:
                self.decision = self._decided(h)
            if step is None:
                return h
            if self.decision is None:
                raise InputError("Conditional: tokens were decoded before any prompt was read")
            return mx.where(self.decision.reshape(-1, *[1] * (h.ndim - 1)), step(h), h)

        return run

    def _decided(self, h: mx.array) -> mx.array:
        """(B,) which rows of h (B, T, d), right-padded, meet the condition."""
        _check_stream(h, len(self.lengths), "Conditional")
        counts = mx.array(self.lengths)[:, None]
        real = (mx.arange(h.shape[1])[None] < counts)[..., None]
        # where, not a product: padded positions may hold anything.
        mean = mx.where(real, h.astype(mx.float32), 0.0).sum(axis=1) / counts
        norms = mx.maximum(mx.linalg.norm(mean, axis=-1), 1e-12)
        cosines = (mean @ self.value.condition_direction) / norms
        # A comparison with NaN is False: a broken stream would pass for an unmet condition.
        if not bool(mx.isfinite(cosines).all()):
            raise ModelError(
                f"Conditional: residual {self.value.layer} holds NaN or inf, so the "
                "condition cannot be decided; load the model in float32 or bfloat16"
            )
        above = cosines > self.value.threshold
        return above if self.value.above else ~above
