"""Interventions about a point other than zero: flip, erase, ablate to a value.

Frozen values as in `values.py`; `layers` counts residuals here, r being the input of block r.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from vauban.errors import InputError
from vauban.interventions.scopes import check_blocks, check_residuals, layer_set
from vauban.interventions.values import Change
from vauban.linalg import as_basis, project_out


@dataclass(frozen=True, eq=False)
class Flip:
    """Affine reflection h <- h - α D^T D (h - m) of a stream, applied once; α = 2.

    With `midpoint` m halfway between the class means it maps one mean to the other along D; the
    linear flip (m None, the origin; AlterRep's P_2) misses them when zero is not halfway.

    A flip is its own inverse, so for a set S of blocks the stream is reflected once, at the input
    of min(S), and after that the terms which the blocks of S add to it; a block named twice counts
    once. With S = all and no midpoint this equals the weights W <- P_2 W. `midpoint` may be
    {residual: (d,)}: then the point moves with the layer. It has to name min(S) and holds until
    the next residual named in it.

    >>> import mlx.core as mx
    >>> flip = Flip(mx.array([1.0, 0.0]), midpoint=mx.array([3.0, 0.0]), layers=2)
    >>> flip.change("block_input", 2, 4, True)(mx.array([[5.0, 7.0]])).tolist()
    [[1.0, 7.0]]
    """

    basis: mx.array
    midpoint: mx.array | Mapping[int, mx.array] | None = None
    layers: Any = "all"
    alpha: float = 2.0

    def __post_init__(self) -> None:
        basis = as_basis(self.basis, "Flip")
        chosen = layer_set(self.layers, "Flip")
        first = 0 if chosen is None else min(chosen)
        given = self.midpoint
        points = {} if given is None else dict(given) if isinstance(given, Mapping) else {}
        if isinstance(given, mx.array):
            points = {first: given}
        if points and first not in points:
            raise InputError(
                f"Flip: the midpoints name residuals {sorted(points)}; the first block of the "
                f"scope, {first}, needs one"
            )
        for residual, point in points.items():
            if point.shape != (basis.shape[1],):
                raise InputError(
                    f"Flip: the midpoint at {residual} has shape {point.shape}; expected "
                    f"({basis.shape[1]},)"
                )
        # Only the components along D matter: D^T D m.
        along = {
            residual: (points[residual].astype(mx.float32) @ basis.T) @ basis
            for residual in sorted(points)
            if residual == first or chosen is None or residual in chosen
        }
        object.__setattr__(self, "_basis", basis)
        object.__setattr__(self, "_layers", chosen)
        object.__setattr__(self, "_along", along)

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Change | None:
        basis: mx.array = self._basis  # type: ignore[attr-defined]
        chosen: frozenset[int] | None = self._layers  # type: ignore[attr-defined]
        along: dict[int, mx.array] = self._along  # type: ignore[attr-defined]
        check_blocks(chosen, n_layers, "Flip")
        first = 0 if chosen is None else min(chosen)
        if site != "block_input":
            if chosen is not None and layer not in chosen:
                return None
            return lambda h: project_out(h, basis, self.alpha)
        if layer == first:
            shift = self.alpha * along[first] if along else mx.array(0.0)
            return lambda h: (project_out(h.astype(mx.float32), basis, self.alpha) + shift).astype(
                h.dtype
            )
        if layer not in along or layer < first:
            return None
        before = along[max(r for r in along if r < layer)]
        move = self.alpha * (along[layer] - before)
        return lambda h: (h.astype(mx.float32) + move).astype(h.dtype)


@dataclass(frozen=True, eq=False)
class Erase:
    """r(h) = h - left (right (h - mean)) at each named residual, for example by LEACE.

    `eraser` is a `LeaceResult` (anything with left (d, k), right (k, d), mean (d,)) used at all
    `layers`, or {residual: eraser} with one fitted at each; then `layers` defaults to its keys.
    "all" is every residual from the embedding to the output of the last block.
    """

    eraser: Any
    layers: Any = None

    def __post_init__(self) -> None:
        per_layer = isinstance(self.eraser, Mapping)
        erasers = dict(self.eraser) if per_layer else {0: self.eraser}
        if not erasers:
            raise InputError("Erase: no eraser given; expected one, or one per residual")
        for value in erasers.values():
            missing = [n for n in ("left", "right", "mean") if not hasattr(value, n)]
            if missing:
                raise InputError(
                    f"Erase: {type(value).__name__} has no {missing[0]}; expected fit_leace's "
                    "result or {residual: result}"
                )
        if self.layers is None and not per_layer:
            raise InputError("Erase: name the residuals, layers=[...] or 'all'")
        chosen = layer_set(list(erasers) if self.layers is None else self.layers, "Erase")
        if per_layer:
            if chosen is None or not chosen <= set(erasers):
                raise InputError(
                    f"Erase: erasers for residuals {sorted(erasers)}; layers {self.layers!r} "
                    "asks for others"
                )
            erasers = {residual: erasers[residual] for residual in chosen}
        object.__setattr__(self, "_layers", chosen)
        object.__setattr__(self, "_erasers", erasers if per_layer else None)

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Change | None:
        chosen: frozenset[int] | None = self._layers  # type: ignore[attr-defined]
        erasers: dict[int, Any] | None = self._erasers  # type: ignore[attr-defined]
        check_residuals(chosen, n_layers, "Erase")
        if site != "block_input" or (chosen is not None and layer not in chosen):
            return None
        value = self.eraser if erasers is None else erasers[layer]
        left, right, mean = value.left, value.right, value.mean

        def erase(h: mx.array) -> mx.array:
            x = h.astype(mx.float32)
            return (x - ((x - mean) @ right.T) @ left.T).astype(h.dtype)

        return erase


@dataclass(frozen=True, eq=False)
class AblateTo:
    """Affine ablation h <- h - (u·h) u + c u: the projection on u is set to c, not to 0.

    With c the harmless mean of each residual, this removes a behaviour even where zero lies on the
    wrong side of the direction (ACE, Marshall et al. 2024, at strength 0). `value_per_layer` is one
    number, {residual: number}, or a sequence of n_layers + 1 numbers.

    >>> import mlx.core as mx
    >>> to = AblateTo(mx.array([2.0, 0.0]), {1: -3.0}, layers=[1])
    >>> to.change("block_input", 1, 4, True)(mx.array([[9.0, 4.0]])).tolist()
    [[-3.0, 4.0]]
    """

    direction: mx.array
    value_per_layer: float | Mapping[int, float] | Sequence[float] | mx.array
    layers: Any = "all"

    def __post_init__(self) -> None:
        if self.direction.ndim != 1:
            raise InputError(f"AblateTo: direction has shape {self.direction.shape}; expected (d,)")
        given = self.value_per_layer
        single = given if isinstance(given, int | float) else None
        if isinstance(given, mx.array) and given.ndim == 0:
            single = float(given)
        values: dict[int, float] | None = None
        if single is None:
            listed = given.tolist() if isinstance(given, mx.array) else given
            pairs: Any = given.items() if isinstance(given, Mapping) else enumerate(listed)  # type: ignore[arg-type]
            values = {int(r): float(v) for r, v in pairs}
        chosen = layer_set(self.layers, "AblateTo")
        missing = sorted((chosen or frozenset()) - set(values)) if values is not None else []
        if missing:
            raise InputError(f"AblateTo: no value for residual {missing[0]}; give one for each")
        object.__setattr__(self, "_basis", as_basis(self.direction, "AblateTo"))
        object.__setattr__(self, "_values", values)
        object.__setattr__(self, "_single", single)
        object.__setattr__(self, "_layers", chosen)

    @classmethod
    def from_result(cls, result: Any, layers: Any = None) -> AblateTo:
        """The harmless means of a `DirectionResult` along its direction, at block outputs.

        Residual 0 is the embedding, where `result` has no mean; all others by default.
        """
        along = (result.means[0] @ result.direction).tolist()
        values = {residual: float(v) for residual, v in enumerate(along, start=1)}
        return cls(result.direction, values, sorted(values) if layers is None else layers)

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Change | None:
        basis: mx.array = self._basis  # type: ignore[attr-defined]
        values: dict[int, float] | None = self._values  # type: ignore[attr-defined]
        chosen: frozenset[int] | None = self._layers  # type: ignore[attr-defined]
        check_residuals(chosen, n_layers, "AblateTo")
        if site != "block_input" or (chosen is not None and layer not in chosen):
            return None
        if values is not None and layer not in values:
            raise InputError(f"AblateTo: no value for residual {layer}; give one for each")
        value = self._single if values is None else values[layer]  # type: ignore[attr-defined]
        target = value * basis[0]
        return lambda h: (project_out(h.astype(mx.float32), basis, 1.0) + target).astype(h.dtype)
