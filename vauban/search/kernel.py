"""A strength for every block, said by four numbers: the shape that a search of cuts varies.

Knows numbers only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from vauban._results import to_plain
from vauban.errors import InputError


@dataclass(frozen=True)
class StrengthKernel:
    """Strength over the blocks: `peak` at `centre`, falling linearly to `floor` at `width` blocks.

    peak    the α at `centre`; negative strengthens the direction, above 1 reverses it
    centre  a place among the blocks, from 0 to L-1; fractions lie between two blocks
    width   blocks from `centre` to where the strength reaches `floor`; inf: `peak` everywhere
    floor   the α beyond

    Raises InputError for a number that is not finite, or a width that is not above 0.

    >>> StrengthKernel(1.0, 2.0, 2.0, 0.0).strengths(6)
    (0.0, 0.5, 1.0, 0.5, 0.0, 0.0)
    >>> StrengthKernel.constant(0.7).strengths(3)
    (0.7, 0.7, 0.7)
    """

    peak: float
    centre: float
    width: float
    floor: float

    def __post_init__(self) -> None:
        for name in ("peak", "centre", "floor"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(f"{name} of a kernel is {getattr(self, name)}; expected a number")
        if not self.width > 0:
            raise InputError(f"width of a kernel is {self.width}; expected blocks above 0")

    @classmethod
    def constant(cls, strength: float) -> StrengthKernel:
        """The same strength in every block."""
        return cls(strength, 0.0, math.inf, strength)

    def scaled(self, factor: float) -> StrengthKernel:
        """The same shape, so many times as strong."""
        return replace(self, peak=factor * self.peak, floor=factor * self.floor)

    def strengths(self, n_layers: int) -> tuple[float, ...]:
        """The α of blocks 0 to L-1."""
        shares = (min(1.0, abs(block - self.centre) / self.width) for block in range(n_layers))
        return tuple(self.peak + share * (self.floor - self.peak) for share in shares)

    def to_dict(self) -> dict[str, Any]:
        return to_plain(self)
