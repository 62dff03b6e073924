"""Ablation, projection and addition as frozen values: direction in, function of an array out.

Knows sites, layers and arrays; does not know models, caches or tokens. `vauban.models` asks each
value what it does at (site, layer) and applies the answer.

Sites: "block_input" is the residual stream as a block reads it; "attention_output" and
"mlp_output" are the two terms as they are added to the stream, after post-norm and multiplier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import mlx.core as mx

from vauban.errors import InputError
from vauban.interventions.scopes import check_blocks, layer_set
from vauban.linalg import as_basis, project_out

SITES = ("block_input", "attention_output", "mlp_output")
Change = Callable[[mx.array], mx.array]


@runtime_checkable
class Intervention(Protocol):
    """What `forward` and `generate` accept: a value that says what happens where."""

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Change | None:
        """The function for the stream term at `site` of block `layer`, None where nothing happens.

        `layer == n_layers` with site "block_input" is the output of the last block. `prefill` is
        False while new tokens are decoded.
        """
        ...


@dataclass(frozen=True, eq=False)
class Ablate:
    """Directional ablation h <- h - D^T D h (Arditi et al. 2024, arXiv 2406.11717, eq. 4).

    `direction` is (d,) or a basis (k, d); it is orthonormalised on entry. Applied at every token,
    in prefill and decoding, at the named sites of the named blocks.

    >>> import mlx.core as mx
    >>> ablate = Ablate(mx.array([1.0, 0.0]))
    >>> ablate.change("block_input", 0, 4, True)(mx.array([[3.0, 4.0]])).tolist()
    [[0.0, 4.0]]
    """

    direction: mx.array
    layers: Any = "all"
    sites: Iterable[str] = SITES

    def __post_init__(self) -> None:
        sites = (self.sites,) if isinstance(self.sites, str) else tuple(self.sites)
        unknown = set(sites) - set(SITES)
        if unknown or not sites:
            raise InputError(f"Ablate: sites {sorted(unknown)} unknown; expected some of {SITES}")
        object.__setattr__(self, "sites", sites)
        object.__setattr__(self, "_basis", as_basis(self.direction, "Ablate"))
        object.__setattr__(self, "_layers", layer_set(self.layers, "Ablate"))

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Change | None:
        basis: mx.array = self._basis  # type: ignore[attr-defined]
        chosen: frozenset[int] | None = self._layers  # type: ignore[attr-defined]
        check_blocks(chosen, n_layers, "Ablate")
        if layer == n_layers or site not in self.sites:
            return None
        if chosen is not None and layer not in chosen:
            return None
        return lambda h: project_out(h, basis, 1.0)


@dataclass(frozen=True, eq=False)
class Project:
    """P_α h = h - α D^T D h, once per stream: α 1 erases, 2 reflects.

    A reflection applied to every block input would undo itself at the next block, so for a set S
    of blocks the stream is transformed once, at the input of min(S), and after that only the terms
    that the blocks of S add to it. With S = all blocks this equals the weights W <- P_α W.
    """

    basis: mx.array
    alpha: float = 1.0
    layers: Any = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "_basis", as_basis(self.basis, "Project"))
        object.__setattr__(self, "_layers", layer_set(self.layers, "Project"))

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Change | None:
        basis: mx.array = self._basis  # type: ignore[attr-defined]
        chosen: frozenset[int] | None = self._layers  # type: ignore[attr-defined]
        check_blocks(chosen, n_layers, "Project")
        first = 0 if chosen is None else min(chosen)
        if site == "block_input":
            if layer != first:
                return None
        elif chosen is not None and layer not in chosen:
            return None
        return lambda h: project_out(h, basis, self.alpha)


@dataclass(frozen=True, eq=False)
class Add:
    """Activation addition h <- h + scale · v at one residual (Arditi et al. 2024, eq. 3).

    `layer` is a RESIDUAL index: r adds to the input of block r, r = n_layers to the output of the
    last block. `direction` is used as given, not normalised. `positions` "all" adds at every token
    in prefill and decoding, "prompt" only while the prompt is read.
    """

    direction: mx.array
    scale: float
    layer: int
    positions: Literal["all", "prompt"] = "all"

    def __post_init__(self) -> None:
        if self.direction.ndim != 1:
            raise InputError(f"Add: direction has shape {self.direction.shape}; expected (d,)")
        if self.positions not in ("all", "prompt"):
            raise InputError(f"Add: positions is {self.positions!r}; expected 'all' or 'prompt'")
        if self.layer < 0:
            raise InputError(f"Add: layer {self.layer} is negative; residuals count from 0")

    @classmethod
    def from_result(cls, result: Any, k: float, positions: Literal["all", "prompt"] = "all") -> Add:
        """k times the raw (unnormalised) difference of a `DirectionResult`, at its own residual."""
        raw = result.direction * result.norms[result.layer_index]
        return cls(raw, float(k), result.residual_index, positions)

    @classmethod
    def from_classifier(
        cls, classifier: Any, result: Any, k: float, positions: Literal["all", "prompt"] = "all"
    ) -> Add:
        """k · |v| along a classifier's weights, v the raw difference of a `DirectionResult`.

        Weights have a scale of their own, so that only this makes steering with them comparable
        to `from_result`. `classifier` is a fitted `Direction` or an array (d,), measured at the
        residual of `result`; its sign is the classifier's (harmful scores higher).
        """
        w = getattr(classifier, "vector", classifier)
        if w.shape != result.direction.shape:
            raise InputError(
                f"Add: the classifier has shape {w.shape}, the result {result.direction.shape}; "
                "expected both from one residual stream"
            )
        norm = float(mx.linalg.norm(w))
        if not 0.0 < norm < float("inf"):
            raise InputError(f"Add: the classifier's weights have norm {norm}")
        v = float(result.norms[result.layer_index])
        return cls(w * (v / norm), float(k), result.residual_index, positions)

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Change | None:
        if self.layer > n_layers:
            raise InputError(
                f"Add: residual {self.layer} does not exist; the model has 0 to {n_layers}"
            )
        if site != "block_input" or layer != self.layer:
            return None
        if self.positions == "prompt" and not prefill:
            return None
        step = self.scale * self.direction.astype(mx.float32)
        return lambda h: (h.astype(mx.float32) + step).astype(h.dtype)
