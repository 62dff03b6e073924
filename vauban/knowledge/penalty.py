"""The penalty of a ridge update, and the directions of the inputs that it protects.

Every method of the family is Δ = Rᵀ K (KᵀK + KpᵀKp + M)⁻¹ with another M, diagonal in the
eigenbasis of the second moment C: MEMIT λΛ, ENCORE λΛ + λn, AlphaEdit l2 where Λ < τ and infinite
elsewhere, BetaEdit l2 + λΛ there, ridge l2. So a penalty is a C + b I and a thin basis U of what
may not be touched. Arrays only.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from vauban._arrays import as_numpy
from vauban.errors import InputError, VaubanWarning, shown
from vauban.knowledge.key_stats import KeyStats

METHODS = ("memit", "alphaedit", "encore", "betaedit", "ridge")
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "memit": {"lam": "auto"},
    "encore": {"lam": "auto", "lam_n": 20.0},
    "alphaedit": {"tau": 0.02, "l2": "auto"},
    "betaedit": {"tau": 0.02, "l2": "auto", "lam": "auto"},
    "ridge": {"l2": "auto"},
}
_CHOICES = ("tau", "rank", "energy")
# What "auto" makes of kᵀM⁻¹k for a mean key of plain text: alone, it would get the share e/(1 + e)
# of its residual. The published λ of 15000 is an e of about 1 for keys 14336 wide.
ENERGY = 16.0
# Up to this width all eigenvectors are cheaper than iterations (0.5 s at 2048 on one core).
DIRECT = 2048
# The first block of the iteration, its rounds at most, and the change of the Ritz values at which
# it stops.
_BLOCK, _ROUNDS, _STEADY = 96, 60, 1e-6
# What is added to a moment that is not positive definite, as a share of its mean eigenvalue.
_FLOOR = 1e-6


@dataclass(frozen=True, eq=False)
class Penalty:
    """M = `scale` C + `shift` I outside the rows of `protected` (r, d0), infinite along them.

    `moment` is C (d0, d0); `method` and `settings` say what it was made from, with the numbers that
    "auto" stood for.

    >>> import mlx.core as mx
    >>> stats = KeyStats.from_moment(mx.array([[4.0, 0.0], [0.0, 1.0]]), count=100, layer=0)
    >>> rule = penalty(stats, "memit", lam=0.5)
    >>> rule.scale, rule.size, rule.inverse([[1.0, 1.0]]).tolist()
    (0.5, 2, [[0.5, 2.0]])
    """

    method: str
    moment: mx.array
    scale: float
    shift: float
    protected: mx.array
    settings: Mapping[str, Any]
    _leading: mx.array | None = field(default=None, init=False, repr=False)

    @property
    def size(self) -> int:
        """d0, the width of the keys."""
        return int(self.moment.shape[0])

    @cached_property
    def _inverse(self) -> np.ndarray | None:
        """(a C + b I)⁻¹ in float64; None where it is a multiple of the identity."""
        if not self.scale:
            return None
        matrix = self.scale * as_numpy(self.moment).astype(np.float64)
        matrix[np.diag_indices(self.size)] += self.shift
        try:
            np.linalg.cholesky(matrix)
        except np.linalg.LinAlgError:
            floor = _FLOOR * np.trace(matrix) / self.size
            matrix[np.diag_indices(self.size)] += floor
        inverse: np.ndarray = np.linalg.inv(matrix)
        return inverse

    @cached_property
    def _basis(self) -> np.ndarray:
        return as_numpy(self.protected).astype(np.float64)

    def project(self, rows: np.ndarray) -> np.ndarray:
        """rows P (..., d0) in float64, P = I - UᵀU: nothing of them along what is protected."""
        out = np.asarray(rows, np.float64)
        for _ in range(2 if len(self._basis) else 0):
            out = out - (out @ self._basis.T) @ self._basis
        return out

    def inverse(self, rows: np.ndarray) -> np.ndarray:
        """rows M⁻¹ (n, d0) in float64, zero along what is protected."""
        rows = np.asarray(rows, np.float64)
        matrix = self._inverse
        return self.project(rows / self.shift if matrix is None else self.project(rows) @ matrix)

    def leading(self, **bound: Any) -> mx.array:
        """`protected_directions` of the moment, found once; for "+P" with a penalty of its own."""
        if self._leading is None:
            object.__setattr__(self, "_leading", protected_directions(self.moment, **bound))
        assert self._leading is not None
        return self._leading

    def summary(self) -> str:
        given = ", ".join(f"{k} {v:.6g}" for k, v in self.settings.items() if v is not None)
        return f"{self.method} ({given}), {len(self.protected)} of {self.size} directions protected"

    def to_dict(self) -> dict[str, Any]:
        """Method, settings, and how many directions are protected."""
        return {
            "method": self.method,
            "settings": dict(self.settings),
            "protected": len(self.protected),
            "d0": self.size,
        }


def penalty(stats: KeyStats, method: str, **settings: Any) -> Penalty:
    """The penalty of a method on the second moment of one layer's keys.

    "memit": `lam` C. "encore": `lam` C + `lam_n` I. "alphaedit": `l2` I on directions with an
    eigenvalue below `tau`, nothing may change along the others; instead of `tau` the NUMBER of
    protected directions, `rank`, or the share of tr C that they hold, `energy`. "betaedit": as
    "alphaedit" with `lam` C added. "ridge": `l2` I.

    `lam` and `l2` "auto" have no scale: over plain text the mean of kᵀM⁻¹k, by which a key resists
    being held, is `ENERGY`. The mean of kᵀC⁻¹k is d0 whatever C is, so `lam` is d0 / ENERGY and
    `l2` is tr C / ENERGY, both counted on the directions that are free.

    Raises InputError for an unknown method or setting, for two of tau, rank and energy, for
    numbers that cannot be, and where every direction would be protected. A VaubanWarning says
    where none is.

    Meng et al. 2023 (arXiv 2210.07229), Fang et al. 2025 (2410.02355), Gupta et al. 2025
    (2502.01636).

    >>> import mlx.core as mx
    >>> stats = KeyStats.from_moment(mx.array([[4.0, 0.0], [0.0, 0.01]]), count=100, layer=0)
    >>> penalty(stats, "alphaedit", rank=1, l2=2.0).inverse([[1.0, 1.0]]).tolist()
    [[0.0, 0.5]]
    """
    if method not in METHODS:
        raise InputError(f"method is {shown(method)}; expected one of {', '.join(METHODS)}")
    known = dict(_DEFAULTS[method])
    allowed = {*known, *(_CHOICES if "tau" in known else ())}
    given = {name: value for name, value in settings.items() if value is not None}
    unknown = sorted(given.keys() - allowed)
    if unknown:
        raise InputError(f"{method} has no setting {unknown[0]!r}; it has {sorted(allowed)}")
    chosen = [name for name in _CHOICES if name in given]
    if len(chosen) > 1:
        raise InputError(f"{' and '.join(chosen)} are given; expected one of {_CHOICES}")
    if chosen:
        known.pop("tau", None)
    known |= given
    automatic = [name for name in ("lam", "l2") if known.get(name) == "auto"]
    for name, value in known.items():
        if name in automatic:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < float("inf"):
            raise InputError(f"{name} is {shown(value)}; expected a number above 0")
    basis = mx.zeros((0, int(stats.moment.shape[0])))
    for name in _CHOICES:
        if name in known:
            basis = protected_directions(stats.moment, **{name: known[name]})
            if not len(basis):
                warnings.warn(
                    f"{name} {known[name]:g} protects none of {basis.shape[1]} directions of "
                    f"layer {stats.layer}: this is a plain ridge",
                    VaubanWarning,
                    stacklevel=2,
                )
    for name in automatic:
        known[name] = _automatic(stats, basis, name)
    shift = float(known.get("l2", 0.0)) + float(known.get("lam_n", 0.0))
    return Penalty(method, stats.moment, float(known.get("lam", 0.0)), shift, basis, known)


def _automatic(stats: KeyStats, basis: mx.array, name: str) -> float:
    """`lam` or `l2` at which a mean key's energy on the free directions is `ENERGY`."""
    if name == "lam":
        return (int(stats.moment.shape[0]) - len(basis)) / ENERGY
    free = mx.diag(stats.moment).sum() - ((basis @ stats.moment) * basis).sum()
    return max(float(free), 1e-30) / ENERGY


def protected_directions(
    moment: mx.array,
    *,
    tau: float | None = None,
    rank: int | None = None,
    energy: float | None = None,
    direct: int = DIRECT,
) -> mx.array:
    """(r, d0) the eigenvectors of `moment` with the largest eigenvalues, row-orthonormal.

    Those with an eigenvalue of at least `tau`, a number (`rank`), or the fewest that hold the share
    `energy` of the trace. Above the width `direct` a block subspace iteration finds them, whose
    block grows until it reaches past the last of them; no d0 x d0 decomposition is made.
    """
    c = as_numpy(moment)
    size = len(c)
    trace = float(np.trace(c.astype(np.float64)))
    if rank is not None and (isinstance(rank, bool) or rank != int(rank) or rank < 1):
        raise InputError(f"rank is {shown(rank)}; expected a whole number of at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise InputError(f"energy is {energy}; expected 0 < energy <= 1")

    def wanted(values: np.ndarray) -> int | None:
        """How many of the leading eigenvalues are to be protected; None: more than these."""
        if rank is not None:
            return None if rank >= len(values) < size else min(int(rank), len(values))
        if energy is not None:
            held = np.cumsum(values) >= energy * trace * (1 - 1e-9)
            return int(held.argmax()) + 1 if held.any() else (None if len(values) < size else size)
        assert tau is not None
        count = int((values >= tau).sum())
        return None if count == len(values) < size else count

    block = min(size, _BLOCK if rank is None else int(1.2 * rank) + 16)
    while True:
        if size <= direct or 2 * block >= size:
            values, vectors = np.linalg.eigh(c.astype(np.float64))
            values, vectors = values[::-1], vectors[:, ::-1]
        else:
            values, vectors = _leading(c, block)
        count = wanted(values)
        if count is not None:
            break
        block = min(size, 2 * block)
    if count >= size:
        given = {"tau": tau, "rank": rank, "energy": energy}
        bound = next(f"{name} {value:g}" for name, value in given.items() if value is not None)
        raise InputError(
            f"{bound} protects all {size} directions (100 % of tr C): nothing could be edited"
        )
    return mx.array(np.ascontiguousarray(vectors[:, :count].T).astype(np.float32))


def _leading(c: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues and their vectors (d0, block) by subspace iteration, in float32.

    The last quarter of the block only drives the convergence of the rest.
    """
    kept = block - block // 4
    vectors = np.random.default_rng(0).standard_normal((len(c), block)).astype(np.float32)
    vectors = np.linalg.qr(vectors)[0]
    before = np.zeros(block)
    for _ in range(_ROUNDS):
        # Two products between orthonormalisations: the spectrum is squared, not yet rank-deficient.
        moved = c @ (c @ vectors)
        vectors = np.linalg.qr(moved)[0]
        values, turn = np.linalg.eigh((vectors.T @ (c @ vectors)).astype(np.float64))
        values, vectors = values[::-1], (vectors @ turn[:, ::-1]).astype(np.float32)
        if np.abs(values - before)[:kept].max() <= _STEADY * values[0]:
            break
        before = values
    return values[:kept], vectors[:, :kept]
