"""Taking a direction out of the stream, reflecting it, or setting the projection to a value.

Each is a frozen value: directions in, a function of an array out. D is a row-orthonormal basis
(k, d), h the stream; see `protocol` for sites and layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

import mlx.core as mx

from vauban.errors import InputError
from vauban.interventions.protocol import (
    SITES,
    Change,
    Checked,
    Scope,
    blocks,
    number,
    residuals,
)
from vauban.linalg import as_basis, as_direction, as_vector, project_out


def _site_set(sites: Any, owner: str) -> frozenset[str]:
    chosen = frozenset((sites,) if isinstance(sites, str) else sites)
    if not chosen or not chosen <= set(SITES):
        unknown = sorted(chosen - set(SITES))
        raise InputError(f"{owner}: sites {unknown} unknown; expected some of {SITES}")
    return chosen


@dataclass(frozen=True, eq=False)
class Ablate(Checked):
    """Directional ablation h <- h - α Dᵀ D h (Arditi et al. 2024, arXiv 2406.11717, eq. 4).

    `direction` is (d,), a basis (k, d) or a result that holds one; it is orthonormalised. It is
    taken out at every token, in prefill and decoding, at the named sites of the named blocks. With
    α other than 1 the changes of all sites and blocks compound; `Project` changes a stream once.

    >>> import mlx.core as mx
    >>> ablate = Ablate(mx.array([1.0, 0.0]))
    >>> ablate.change("block_input", 0, 4, True)(mx.array([[3.0, 4.0]])).tolist()
    [[0.0, 4.0]]
    """

    direction: Annotated[Any, as_basis]
    layers: Annotated[Any, blocks] = "all"
    sites: Annotated[Any, _site_set] = SITES
    alpha: Annotated[float, number("alpha")] = field(default=1.0, kw_only=True)

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Change | None:
        if not self.layers.covers(layer, n_layers) or site not in self.sites:
            return None
        return lambda h: project_out(h, self.direction, self.alpha)


@dataclass(frozen=True, eq=False)
class Project(Checked):
    """P_α h = h - α Dᵀ D h, once per stream: α 1 erases, 2 reflects.

    `basis` is (d,), (k, d) or a result that holds one. A reflection at every block input would
    undo itself at the next block. For a set S of blocks the stream is therefore changed once, at
    the input of min(S), and after that only the terms that the blocks of S add to it. With S = all
    blocks this equals the weights W <- P_α W.

    >>> import mlx.core as mx
    >>> reflect = Project(mx.array([1.0, 0.0]), alpha=2.0)
    >>> reflect.change("block_input", 0, 4, True)(mx.array([[3.0, 4.0]])).tolist()
    [[-3.0, 4.0]]
    >>> reflect.change("block_input", 1, 4, True) is None  # the stream is reflected already
    True
    """

    basis: Annotated[Any, as_basis]
    alpha: Annotated[float, number("alpha")] = 1.0
    layers: Annotated[Any, blocks] = "all"

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Change | None:
        inside = self.layers.covers(layer, n_layers)
        changed = layer == self.layers.first if site == "block_input" else inside
        return (lambda h: project_out(h, self.basis, self.alpha)) if changed else None


@dataclass(frozen=True, eq=False)
class Flip(Checked):
    """Affine reflection h <- h - α Dᵀ D (h - m) of a stream, applied once; α = 2.

    With `midpoint` m halfway between the class means it maps one mean to the other along D; the
    linear flip (m None, the origin; AlterRep's P_2) misses them when zero is not halfway.

    A flip is its own inverse. For a set S of blocks the stream is therefore reflected once, at the
    input of min(S), and after that the terms which the blocks of S add to it; a block named twice
    counts once. With S = all and no midpoint this equals the weights W <- P_2 W. `midpoint` may be
    {residual: (d,)}: then the point moves with the layer. It has to name min(S), and a point holds
    until the next residual that is named.

    >>> import mlx.core as mx
    >>> flip = Flip(mx.array([1.0, 0.0]), midpoint=mx.array([3.0, 0.0]), layers=2)
    >>> flip.change("block_input", 2, 4, True)(mx.array([[5.0, 7.0]])).tolist()
    [[1.0, 7.0]]
    """

    basis: Annotated[Any, as_basis]
    midpoint: Any = None
    layers: Annotated[Any, blocks] = "all"
    alpha: Annotated[float, number("alpha")] = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        first, points = self.layers.first, self._points
        if points and first not in points:
            raise InputError(
                f"Flip: the midpoints name residuals {sorted(points)}; the first block of the "
                f"scope, {first}, needs one"
            )

    @cached_property
    def _points(self) -> dict[int, mx.array]:
        """Dᵀ D m by residual of the scope: only a midpoint's components along D matter."""
        given, first, chosen = self.midpoint, self.layers.first, self.layers.chosen
        points = dict(given) if isinstance(given, Mapping) else {first: given}
        return {
            r: (as_vector(points[r], "Flip: midpoint", self.width) @ self.basis.T) @ self.basis
            for r in sorted(points)
            if points[r] is not None and (r == first or chosen is None or r in chosen)
        }

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Change | None:
        linear = Project(self.basis, self.alpha, self.layers).change(site, layer, n_layers, prefill)
        points, first = self._points, self.layers.first
        if site != "block_input" or layer not in points or layer < first:
            return linear
        # Past the first block the stream is flipped already: the point moves on from the last one.
        before = points[max(r for r in points if r < layer)] if layer > first else 0.0
        step = self.alpha * (points[layer] - before)

        def flip(h: mx.array) -> mx.array:
            x = h.astype(mx.float32)
            return ((linear(x) if linear else x) + step).astype(h.dtype)

        return flip


def _erasers(given: Any, owner: str) -> dict[int | None, Any]:
    """By residual; under None the eraser for all of them."""
    erasers = dict(given) if isinstance(given, Mapping) else {None: given}
    for value in erasers.values():
        missing = [n for n in ("left", "right", "mean") if not hasattr(value, n)]
        if missing:
            raise InputError(
                f"{owner}: {type(value).__name__} has no {missing[0]}; expected fit_leace's "
                "result or {residual: result}"
            )
    if len({value.mean.shape[-1] for value in erasers.values()}) != 1:
        raise InputError(f"{owner}: no eraser is given, or erasers of different width")
    return erasers


@dataclass(frozen=True, eq=False)
class Erase(Checked):
    """r(h) = h - left (right (h - mean)) at each named residual, for example by LEACE.

    `eraser` is a `LeaceResult` (anything with left (d, k), right (k, d), mean (d,)) used at all
    `layers`, or {residual: eraser} with one fitted at each; then `layers` defaults to its keys.
    "all" is every residual from the embedding to the output of the last block.

    >>> import mlx.core as mx, vauban
    >>> X = mx.array([[0.0, 1], [0, 3], [4, 1], [4, 3]])
    >>> erase = Erase(vauban.fit_leace(X, mx.array([0, 0, 1, 1])), layers=[2])
    >>> erase.change("block_input", 2, 4, True)(X).tolist()
    [[2.0, 1.0], [2.0, 3.0], [2.0, 1.0], [2.0, 3.0]]
    """

    eraser: Annotated[Any, _erasers]
    layers: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is None and None in self.eraser:
            raise InputError("Erase: name the residuals, layers=[...] or 'all'")
        chosen = self._scope.chosen
        if None not in self.eraser and (chosen is None or not chosen <= set(self.eraser)):
            raise InputError(
                f"Erase: erasers for residuals {sorted(self.eraser)}; layers {self.layers!r} "
                "asks for others"
            )

    @cached_property
    def _scope(self) -> Scope:
        return residuals(self.eraser if self.layers is None else self.layers, "Erase")

    @property
    def width(self) -> int:
        return int(next(iter(self.eraser.values())).mean.shape[-1])

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Change | None:
        if not self._scope.covers(layer, n_layers) or site != "block_input":
            return None
        value = self.eraser.get(layer, self.eraser.get(None))
        left, right, mean = value.left, value.right, value.mean

        def erase(h: mx.array) -> mx.array:
            x = h.astype(mx.float32)
            return (x - ((x - mean) @ right.T) @ left.T).astype(h.dtype)

        return erase


def _values(given: Any, owner: str) -> float | dict[int, float]:
    """One number, or one for each residual."""
    listed = given.tolist() if hasattr(given, "tolist") else given
    pairs: Any = listed.items() if isinstance(listed, Mapping) else ()
    if isinstance(listed, Sequence):
        pairs = enumerate(listed)
    elif not isinstance(listed, Mapping):
        return number("the value")(listed, owner)
    return {int(r): number(f"the value of residual {r}")(v, owner) for r, v in pairs}


@dataclass(frozen=True, eq=False)
class AblateTo(Checked):
    """Affine ablation h <- h - (u·h) u + c u: the projection on u is set to c, not to 0.

    With c the harmless mean of each residual, this removes a behaviour even where zero lies on the
    wrong side of the direction (ACE, Marshall et al. 2024, at strength 0). `value_per_layer` is one
    number, {residual: number}, or a sequence of n_layers + 1 numbers; `layers` are residuals.

    >>> import mlx.core as mx
    >>> to = AblateTo(mx.array([2.0, 0.0]), {1: -3.0}, layers=[1])
    >>> to.change("block_input", 1, 4, True)(mx.array([[9.0, 4.0]])).tolist()
    [[-3.0, 4.0]]
    """

    direction: Annotated[Any, as_direction]
    value_per_layer: Annotated[Any, _values]
    layers: Annotated[Any, residuals] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        for layer in sorted(self.layers.chosen or ()):
            self._value(layer)

    def _value(self, layer: int) -> float:
        values = self.value_per_layer
        if isinstance(values, dict) and layer not in values:
            raise InputError(f"AblateTo: no value for residual {layer}; give one for each")
        return values[layer] if isinstance(values, dict) else values

    @classmethod
    def from_result(cls, result: Any, layers: Any = None) -> AblateTo:
        """The harmless means of a `DirectionResult` along its direction, at block outputs.

        Residual 0 is the embedding, where `result` has no mean; all others by default.
        """
        along = (result.means[0] @ result.direction).tolist()
        values = {residual: float(v) for residual, v in enumerate(along, start=1)}
        return cls(result.direction, values, sorted(values) if layers is None else layers)

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Change | None:
        if not self.layers.covers(layer, n_layers) or site != "block_input":
            return None
        basis, target = self.direction[None], self._value(layer) * self.direction
        return lambda h: (project_out(h.astype(mx.float32), basis) + target).astype(h.dtype)
