"""The space of cuts that a search varies, and what a point of it means: a direction and strengths.

Knows numbers and names. Knows no model: `direction_table` holds the vectors, `trials` runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from vauban._results import to_plain
from vauban.directions.mean_estimators import METHODS
from vauban.edits.lowrank import NORM_MODES, NormMode
from vauban.errors import InputError
from vauban.search.kernel import StrengthKernel
from vauban.search.strength import Strength

COMPONENTS = ("attention", "mlp")
Span = tuple[float, float]


@dataclass(frozen=True)
class KernelSpace:
    """Ranges of a component's strength kernel, (lowest, highest); equal ends fix a number.

    peak    α at the centre; below 0 strengthens the direction, above 1 reverses it
    centre  place among the blocks as a share of the depth
    width   blocks from the centre to where the strength is `floor`, as a share of their number
    floor   the strength far away as a share of the peak; 1 is the same strength everywhere

    Raises InputError for a range that is none, or a width that can be 0.

    >>> fixed = KernelSpace(peak=(1.0, 1.0), floor=(1.0, 1.0))  # strength 1 in every block
    >>> space = SearchSpace(attention=fixed, residuals=(2, 4), norm_modes=(None,))
    >>> space.bounds(6)["attention.peak"]
    (1.0, 1.0)
    """

    peak: Span = (0.0, 2.0)
    centre: Span = (0.0, 1.0)
    width: Span = (0.1, 1.0)
    floor: Span = (0.0, 1.0)

    def __post_init__(self) -> None:
        for f in fields(self):
            low, high = getattr(self, f.name)
            object.__setattr__(self, f.name, (float(low), float(high)))
            if not -1e6 < low <= high < 1e6:
                raise InputError(f"{f.name} is {(low, high)}; expected (lowest, highest)")
        if not self.width[0] > 0:
            raise InputError(f"width is {self.width}; expected shares of the depth above 0")


@dataclass(frozen=True)
class SearchSpace:
    """What varies between the trials of a search.

    residuals    (first, last) residual whose directions are tried; None: 1 to L-1
    interpolate  also between two residuals: the unit directions of both, weighted by nearness
    positions    token positions; None: every token of the template after the instruction
    estimators   names that `measure` takes as `method`
    attention    the strength of attention's writers (with SSM), as a kernel over the blocks
    mlp          the same for the MLPs and experts
    norm_modes   `plan_cut`'s norm_preserve; None restores nothing. A mode makes float matrices
                 of all writers that are cut, so packed models are better left with (None,)

    A trial's parameters are residual, position, estimator, norm_mode and, for each component, peak,
    centre (in blocks), width (in blocks) and floor (as a share of the peak).

    Raises InputError for a name or a range that is none, and for a space in which nothing is cut.

    >>> SearchSpace(residuals=(2, 4), norm_modes=(None,)).bounds(6)["residual"]
    (2, 4)
    """

    residuals: Span | None = None
    interpolate: bool = True
    positions: tuple[int, ...] | None = None
    estimators: tuple[str, ...] = ("mean_difference", "variance_scaled")
    attention: KernelSpace = KernelSpace()
    mlp: KernelSpace = KernelSpace(peak=(-0.5, 1.5))
    norm_modes: tuple[NormMode, ...] = (None, "column")

    def __post_init__(self) -> None:
        for name in ("estimators", "norm_modes", *(["positions"] if self.positions else [])):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        wrong = [name for name in self.estimators if name not in METHODS]
        if wrong or not self.estimators:
            raise InputError(f"estimators {wrong or '()'}; expected some of {METHODS}")
        modes = [mode for mode in self.norm_modes if mode not in (None, *NORM_MODES)]
        if modes or not self.norm_modes:
            raise InputError(f"norm_modes {modes or '()'}; expected None or some of {NORM_MODES}")
        if self.positions is not None and (not self.positions or max(self.positions) >= 0):
            raise InputError(f"positions {self.positions}; expected negative ints")
        if not any(any(getattr(self, name).peak) for name in COMPONENTS):
            raise InputError("both peaks are 0 alone: the space holds no cut")

    def resolved(self, n_layers: int, positions: tuple[int, ...]) -> SearchSpace:
        """The space with what None stands for on a model; InputError for residuals it lacks."""
        low, high = self.residuals or (1, n_layers - 1)
        if not 1 <= low <= high <= n_layers - 1:
            raise InputError(
                f"residuals are {(low, high)}; expected (first, last) from 1 to {n_layers - 1}"
            )
        chosen = self.positions or positions
        return replace(self, residuals=(float(low), float(high)), positions=tuple(chosen))

    def bounds(self, n_layers: int) -> dict[str, Span]:
        """(lowest, highest) of every numeric parameter of a resolved space."""
        assert self.residuals is not None
        ranges = {"residual": self.residuals}
        for name in COMPONENTS:
            kernel: KernelSpace = getattr(self, name)
            ranges |= {
                f"{name}.peak": kernel.peak,
                f"{name}.centre": _scaled(kernel.centre, n_layers - 1),
                f"{name}.width": _scaled(kernel.width, n_layers),
                f"{name}.floor": kernel.floor,
            }
        return ranges

    def choices(self) -> dict[str, tuple[Any, ...]]:
        """The values of every parameter that is a choice, of a resolved space."""
        assert self.positions is not None
        return {
            "position": self.positions, "estimator": self.estimators, "norm_mode": self.norm_modes
        }  # fmt: skip

    def parameters(
        self, n_layers: int, residual: float, position: int, strength: Strength,
        estimator: str | None = None,
    ) -> dict[str, Any] | None:  # fmt: skip
        """A known cut as parameters, without norms restored; numbers outside the space moved in.

        None where the space has no such position, estimator or norm mode.
        """
        values: dict[str, Any] = {
            "residual": float(residual),
            "position": position,
            "estimator": estimator or self.estimators[0],
            "norm_mode": None,
        }
        if any(values[name] not in given for name, given in self.choices().items()):
            return None
        for name in COMPONENTS:
            kernel: StrengthKernel = getattr(strength, name)
            constant = kernel.peak == kernel.floor
            values |= {
                f"{name}.peak": kernel.peak,
                f"{name}.centre": 0.5 * (n_layers - 1) if constant else kernel.centre,
                f"{name}.width": 0.5 * n_layers if constant else kernel.width,
                f"{name}.floor": 1.0 if constant else kernel.floor / (kernel.peak or 1.0),
            }
        for name, (low, high) in self.bounds(n_layers).items():
            values[name] = min(max(float(values[name]), low), high)
        return values

    def to_dict(self) -> dict[str, Any]:
        return to_plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SearchSpace:
        """What `to_dict` made."""
        given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        for name in COMPONENTS:
            given[name] = KernelSpace(**{k: tuple(v) for k, v in given[name].items()})
        return cls(**given)


def strength_of(parameters: Mapping[str, Any]) -> Strength:
    """The strength kernels of a trial's parameters.

    >>> p = {f"{c}.{n}": v for c in COMPONENTS for n, v in
    ...      (("peak", 1.2), ("centre", 2.0), ("width", 3.0), ("floor", 0.5))}
    >>> strength_of(p).mlp
    StrengthKernel(peak=1.2, centre=2.0, width=3.0, floor=0.6)
    """

    def kernel(name: str) -> StrengthKernel:
        peak, centre, width, floor = (
            float(parameters[f"{name}.{part}"]) for part in ("peak", "centre", "width", "floor")
        )
        if floor == 1.0:
            return StrengthKernel.constant(peak)
        return StrengthKernel(peak, centre, width, floor * peak)

    return Strength(kernel("attention"), kernel("mlp"))


def _scaled(span: Span, factor: float) -> Span:
    return span[0] * factor, span[1] * factor
