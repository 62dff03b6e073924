"""Sparse direction surgery: how concentrated a direction is over rows, and cutting only there.

Arrays in, frozen results and text out. Side "input" projects the rows of W (out, in) themselves, as
the method's source does; it is wrong for residual writers, whose OUTPUT carries the direction:
there side "output" cuts the rows of d (d^T W) with the largest |d_i|.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from vauban.edits.options import finite
from vauban.errors import InputError, VaubanWarning
from vauban.linalg import as_array, as_direction

Side = Literal["input", "output"]


@dataclass(frozen=True)
class SparseProjectionResult:
    """One matrix. Shares in [0, 1]; projections are |w_i . r| (input) or |d_i| ‖d^T W‖ (output).

    >>> import mlx.core as mx
    >>> surgeon = SparseDirectionSurgeon(sparsity=0.25)
    >>> found = surgeon.analyze_weight_matrix(mx.eye(4), mx.array([0.8, 0.6, 0, 0]), side="output")
    >>> found.n_rows_modified, round(found.energy_removed, 6)
    (1, 0.64)
    """

    layer_idx: int
    n_rows_total: int
    n_rows_modified: int
    sparsity: float
    mean_projection: float
    max_projection: float
    median_projection: float
    refusal_sparsity_index: float
    projection_gini: float
    energy_removed: float
    frobenius_change: float

    def summary(self) -> str:
        return SparseDirectionSurgeon.format_analysis(self)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class SparseSurgeryPlan:
    """Several matrices, one a layer; empty plans hold zeros and the surgeon's own sparsity.

    >>> import mlx.core as mx
    >>> d = mx.array([0.8, 0.6, 0.0, 0.0])
    >>> plan = SparseDirectionSurgeon().plan_surgery({3: mx.eye(4)}, {3: d}, side="output")
    >>> plan.most_sparse_layer, list(plan.per_layer)
    (3, [3])
    """

    per_layer: dict[int, SparseProjectionResult]
    recommended_sparsity: float
    mean_refusal_sparsity_index: float
    mean_energy_removed: float
    mean_frobenius_change: float
    most_sparse_layer: int
    most_dense_layer: int

    def summary(self) -> str:
        return SparseDirectionSurgeon.format_plan(self)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "per_layer": {i: r.to_dict() for i, r in self.per_layer.items()}}


def gini(values: np.ndarray) -> float:
    """2 Σ i·x₍ᵢ₎ / (n Σ x) - (n + 1)/n, ascending from 1: 0 is even, near 1 concentrated."""
    x = np.sort(np.asarray(values, dtype=np.float64))
    total = x.sum()
    if x.size == 0 or total <= 0:
        return 0.0
    ranks = np.arange(1, x.size + 1)
    return float(2 * (ranks * x).sum() / (x.size * total) - (x.size + 1) / x.size)


def knee(descending: np.ndarray, default: float) -> float:
    """Share of rows up to the point farthest from the chord of the normalised, sorted curve.

    Kept in [0.01, 0.5]; `default` where there is no curve (fewer than 3 rows, or all zero).
    """
    n = descending.size
    if n < 3 or descending[0] < 1e-10:
        return default
    y = descending / descending[0]
    x = np.arange(n) / (n - 1)
    rise = y[-1] - y[0]
    length = math.hypot(1.0, rise)
    distance = np.abs(rise * x - y + y[0]) / length
    inside = distance[1:-1]
    index = int(inside.argmax()) + 1 if inside.size and inside.max() > 0 else 0
    return float(max(0.01, min(0.5, (index + 1) / n)))


def keep_rows(basis: mx.array, rows: int) -> mx.array:
    """A mask (out, 1) of the `rows` rows that carry most of the basis D (k, out)."""
    size = np.linalg.norm(np.array(basis.astype(mx.float32)), axis=0)
    mask = np.zeros((size.size, 1), dtype=np.float32)
    mask[np.argsort(-size, kind="stable")[:rows]] = 1.0
    return mx.array(mask)


class SparseDirectionSurgeon:
    """Cut a direction from the share of rows where it is largest, and say how sparse it is.

    `sparsity` is the share of rows that are modified; `auto_sparsity` finds it at the knee.

    >>> import mlx.core as mx
    >>> surgeon = SparseDirectionSurgeon(sparsity=0.25)
    >>> weight = mx.array([[4.0, 0.0], [0.1, 1.0], [0.2, 1.0], [0.0, 1.0]])
    >>> surgeon.analyze_weight_matrix(weight, mx.array([1.0, 0.0])).n_rows_modified
    1
    """

    def __init__(self, sparsity: float = 0.1, auto_sparsity: bool = False) -> None:
        self.sparsity = _share(sparsity)
        self.auto_sparsity = auto_sparsity

    def analyze_weight_matrix(
        self,
        weight: Any,
        refusal_direction: Any,
        layer_idx: int = 0,
        side: Side = "input",
    ) -> SparseProjectionResult:
        """The distribution of one direction over the rows of one matrix (out, in)."""
        w, _, projections = _projections(weight, refusal_direction, side)
        order = np.sort(projections)[::-1]
        share = knee(order, self.sparsity) if self.auto_sparsity else self.sparsity
        n = max(1, int(share * projections.size))
        energy = float((projections**2).sum())
        top = float((order[:n] ** 2).sum())
        index = gini(projections)
        return SparseProjectionResult(
            layer_idx=layer_idx,
            n_rows_total=projections.size,
            n_rows_modified=n,
            sparsity=share,
            mean_projection=float(projections.mean()),
            max_projection=float(order[0]),
            # The lower of the two middle values, as the source's median is.
            median_projection=float(order[::-1][(projections.size - 1) // 2]),
            refusal_sparsity_index=index,
            projection_gini=index,
            energy_removed=top / max(energy, 1e-10),
            frobenius_change=math.sqrt(top) / max(float(np.linalg.norm(w)), 1e-10),
        )

    def plan_surgery(
        self,
        weights: Mapping[int, Any],
        refusal_directions: Mapping[int, Any],
        side: Side = "input",
    ) -> SparseSurgeryPlan:
        """Analyse every layer that both mappings have; recommend 1 - mean RSI, in [0.01, 0.5].

        Raises InputError for what is no mapping, and for two that have no layer in common.
        """
        for name, given in (("weights", weights), ("refusal_directions", refusal_directions)):
            if not isinstance(given, Mapping):
                raise InputError(f"{name} is a {type(given).__name__}; expected {{layer: array}}")
        if weights and refusal_directions and not set(weights) & set(refusal_directions):
            raise InputError(
                f"weights has layers {list(weights)}, refusal_directions "
                f"{list(refusal_directions)}; expected some in common"
            )
        results = {
            i: self.analyze_weight_matrix(weights[i], refusal_directions[i], i, side)
            for i in sorted(set(weights) & set(refusal_directions))
        }
        if not results:
            return SparseSurgeryPlan({}, self.sparsity, 0.0, 0.0, 0.0, 0, 0)
        index = {i: r.refusal_sparsity_index for i, r in results.items()}
        mean = sum(index.values()) / len(index)
        return SparseSurgeryPlan(
            per_layer=results,
            recommended_sparsity=max(0.01, min(0.5, 1.0 - mean)),
            mean_refusal_sparsity_index=mean,
            mean_energy_removed=sum(r.energy_removed for r in results.values()) / len(results),
            mean_frobenius_change=sum(r.frobenius_change for r in results.values()) / len(results),
            most_sparse_layer=max(index, key=lambda i: index[i]),
            most_dense_layer=min(index, key=lambda i: index[i]),
        )

    def apply_sparse_projection(
        self,
        weight: Any,
        refusal_direction: Any,
        sparsity: float | None = None,
        side: Side = "input",
    ) -> mx.array:
        """W with the direction taken out of its top rows only; dtype kept, a new array.

        "input": w_i <- w_i - (w_i . r) r. "output": row i of W - d (d^T W) where |d_i| is largest.
        """
        weight = as_array(weight, "weight")
        _, r, projections = _projections(weight, refusal_direction, side)
        share = _share(sparsity) if sparsity is not None else self.sparsity
        if self.auto_sparsity and sparsity is None:
            share = knee(np.sort(projections)[::-1], self.sparsity)
        n = max(1, int(share * projections.size))
        mask = np.zeros((projections.size, 1), dtype=np.float32)
        mask[np.argsort(-projections, kind="stable")[:n]] = 1.0
        w, d = weight.astype(mx.float32), mx.array(r.astype(np.float32))
        if side == "input":
            warnings.warn(
                "side='input' projects what a matrix READS; a residual writer (o_proj, down_proj) "
                "puts the direction OUT, use side='output' for it",
                VaubanWarning,
                stacklevel=2,
            )
            change = (w @ d)[:, None] * d[None]
        else:
            change = d[:, None] * (d @ w)[None]
        return (w - mx.array(mask) * change).astype(weight.dtype)

    @staticmethod
    def format_analysis(result: SparseProjectionResult) -> str:
        """One matrix as text."""
        ratio = result.max_projection / max(result.mean_projection, 1e-10)
        rows = f"{result.n_rows_modified} of {result.n_rows_total} ({result.sparsity:.1%})"
        facts = [
            ("rows to modify", rows),
            ("sparsity index (Gini)", f"{result.refusal_sparsity_index:.3f}"),
            ("projection max", f"{result.max_projection:.4f} ({ratio:.1f} x mean)"),
            ("projection mean", f"{result.mean_projection:.4f}"),
            ("projection median", f"{result.median_projection:.4f}"),
            ("energy removed", f"{result.energy_removed:.1%} of the direction's"),
            ("Frobenius change", f"{result.frobenius_change:.4f} of the matrix's norm"),
        ]
        return "\n".join(
            [f"Sparse surgery, layer {result.layer_idx}", *(f"  {k:24}{v}" for k, v in facts)]
        )

    @staticmethod
    def format_plan(plan: SparseSurgeryPlan) -> str:
        """All layers as text, with what the mean sparsity index says."""
        index = plan.mean_refusal_sparsity_index
        if index > 0.6:
            finding = "the direction is SPARSE: few rows carry it, cutting only those is enough"
        elif index < 0.3:
            finding = "the direction is DENSE: spread over many rows, a sparse cut will miss much"
        else:
            finding = "the direction is moderately sparse: precision is traded against completeness"
        facts = [
            ("layers", str(len(plan.per_layer))),
            ("recommended sparsity", f"{plan.recommended_sparsity:.1%}"),
            ("mean sparsity index", f"{index:.3f}"),
            ("mean energy removed", f"{plan.mean_energy_removed:.1%}"),
            ("mean Frobenius change", f"{plan.mean_frobenius_change:.4f}"),
            ("most sparse layer", str(plan.most_sparse_layer)),
            ("most dense layer", str(plan.most_dense_layer)),
        ]
        return "\n".join(["Sparse surgery plan", *(f"  {k:24}{v}" for k, v in facts), finding])


def _share(sparsity: Any) -> float:
    share = finite(sparsity, "sparsity")
    if not 0.0 < share <= 1.0:
        raise InputError(f"sparsity is {share}; expected 0 < s <= 1")
    return share


def _projections(
    weight: Any, direction: Any, side: Side
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(W, unit r, |projection| per row) in float64."""
    if side not in ("input", "output"):
        raise InputError(f"side is {side!r}; expected 'input' or 'output'")
    weight = as_array(weight, "weight")
    if weight.ndim != 2:
        raise InputError(f"weight has shape {weight.shape}; expected (out, in)")
    if not mx.issubdtype(weight.dtype, mx.floating):
        raise InputError(f"weight is {weight.dtype}; expected floats, a packed matrix unpacked")
    size = int(weight.shape[1] if side == "input" else weight.shape[0])
    r = np.array(as_direction(direction, "refusal_direction", size), dtype=np.float64)
    w = np.array(weight.astype(mx.float32), dtype=np.float64)
    if side == "input":
        return w, r, np.abs(w @ r)
    return w, r, np.abs(r) * np.linalg.norm(r @ w)
