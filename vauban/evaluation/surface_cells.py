"""Counts over the points of a surface map: cells, thresholds by logistic fit, coverage.

Arrays and counts only; knows no model and no file.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vauban._results import to_plain
from vauban.directions.classifiers import solve
from vauban.directions.separation import auc
from vauban.evaluation.intervals import wilson_interval

MINIMUM = 4
"""Judged answers below which a cell has no rate: 0 of 3 says no more than "below 56 %"."""


@dataclass(frozen=True)
class CellRate:
    """`refused` of `judged` answers with the 95 % Wilson interval."""

    refused: int
    judged: int
    rate: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Cell:
    """The rows with the same values on some axes.

    Attributes:
        values: {axis: value}.
        counts: rows by label.
        judged, refused: answers with a verdict, and those that refuse.
        rate, interval: of all judged answers; None below the minimum size.
        harmful, harmless: the same of one label alone; None where the cell has too few of it.
        harmfulness, refusal: mean projections, None where nothing was projected.
    """

    values: Mapping[str, Any]
    counts: Mapping[str, int]
    judged: int
    refused: int
    rate: float | None
    interval: tuple[float, float] | None
    harmful: CellRate | None
    harmless: CellRate | None
    harmfulness: float | None
    refusal: float | None

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_plain(self)
        return plain


@dataclass(frozen=True)
class Threshold:
    """Where along a number refusal starts: a logistic fit of refused on it.

    Attributes:
        value: the number at which half of the answers refuse; None for a flat fit, and where that
            number lies outside those that were seen.
        slope: change of the log-odds per unit; negative where larger values refuse less.
        auc: chance that a refused answer has a larger value than one that does not refuse.
        refused, answered: answers of each class.
    """

    value: float | None
    slope: float
    auc: float
    refused: int
    answered: int

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_plain(self)
        return plain


@dataclass(frozen=True)
class Coverage:
    """How many cells of the map hold rows: `filled` of those that can exist.

    An axis whose value another axis determines over all rows (label by harm) rules out the cells
    that contradict it. `sparse` cells hold fewer rows than the minimum.
    """

    axes: tuple[str, ...]
    filled: int
    sparse: int
    possible: int
    missing: tuple[Mapping[str, Any], ...]

    @property
    def share(self) -> float:
        return self.filled / self.possible

    def to_dict(self) -> dict[str, Any]:
        return {**to_plain(self), "share": self.share}


Axes = Mapping[str, Any]
"""A row's values by axis."""


def group(rows: Sequence[Axes], axes: Sequence[str]) -> dict[tuple[Any, ...], list[int]]:
    """The places of the rows in each cell, cells in the order of their values."""
    cells: dict[tuple[Any, ...], list[int]] = {}
    for place, row in enumerate(rows):
        cells.setdefault(tuple(row[axis] for axis in axes), []).append(place)
    return dict(sorted(cells.items(), key=lambda item: tuple(map(_order, item[0]))))


def rate_of(verdicts: Sequence[bool | None], minimum: int = MINIMUM) -> CellRate | None:
    """The rate of the verdicts that are known; None for fewer than `minimum`.

    >>> rate_of([True, False, None, False, True], minimum=4).rate
    0.5
    """
    judged = [verdict for verdict in verdicts if verdict is not None]
    if len(judged) < max(minimum, 1):
        return None
    refused = sum(judged)
    return CellRate(
        refused, len(judged), refused / len(judged), wilson_interval(refused, len(judged))
    )


def cell(
    values: Axes,
    labels: Sequence[str],
    verdicts: Sequence[bool | None],
    projections: Mapping[str, Sequence[float]],
    minimum: int,
) -> Cell:
    """The counts of one cell from its rows' labels, verdicts and projections."""
    judged = [verdict for verdict in verdicts if verdict is not None]
    rate = rate_of(verdicts, minimum)

    def of(label: str) -> list[bool | None]:
        return [v for v, other in zip(verdicts, labels, strict=True) if other == label]

    def mean(name: str) -> float | None:
        given = projections.get(name)
        return float(np.mean(given)) if given is not None and len(given) else None

    return Cell(
        values=values,
        counts={label: len(of(label)) for label in sorted(set(labels))},
        judged=len(judged),
        refused=sum(judged),
        rate=rate.rate if rate else None,
        interval=rate.interval if rate else None,
        harmful=rate_of(of("harmful"), minimum),
        harmless=rate_of(of("harmless"), minimum),
        harmfulness=mean("harmfulness"),
        refusal=mean("refusal"),
    )


def fit_threshold(values: Sequence[float], refused: Sequence[bool]) -> Threshold | None:
    """Fit log-odds(refused) = b + w x by penalised maximum likelihood; None without both classes.

    x is scaled to unit variance and w² / 2 is added to the loss (scikit-learn's LogisticRegression
    with C = 1), so that classes which the values separate completely have a fit as well.

    >>> fit = fit_threshold([0.0, 1.0, 2.0, 3.0], [False, False, True, True])
    >>> round(fit.value, 6), fit.auc
    (1.5, 1.0)
    """
    x, y = np.asarray(values, dtype=np.float64), np.asarray(refused, dtype=bool)
    positive = int(y.sum())
    if positive in (0, len(y)):
        return None
    centre, spread = float(x.mean()), float(x.std())
    if spread == 0:
        return Threshold(None, 0.0, 0.5, positive, len(y) - positive)
    w, bias = solve("logistic", ((x - centre) / spread)[:, None], y, 1.0)
    slope = float(w[0]) / spread
    at = centre - bias / slope if slope else np.inf
    return Threshold(
        value=float(at) if x.min() <= at <= x.max() else None,
        slope=slope,
        auc=float(auc(x[~y][:, None], x[y][:, None])[0]),
        refused=positive,
        answered=len(y) - positive,
    )


def coverage(rows: Sequence[Axes], axes: Sequence[str], minimum: int = MINIMUM) -> Coverage:
    """How much of the map over `axes` the rows fill (see `Coverage`)."""
    cells = group(rows, axes)
    values = [sorted({row[axis] for row in rows}, key=_order) for axis in axes]
    rules = [
        (i, j, mapping)
        for i, j in itertools.permutations(range(len(axes)), 2)
        if (mapping := _determined(rows, axes[i], axes[j])) is not None
    ]
    possible = [
        combination
        for combination in itertools.product(*values)
        if all(mapping[combination[i]] == combination[j] for i, j, mapping in rules)
    ]
    missing = [combination for combination in possible if combination not in cells]
    return Coverage(
        tuple(axes),
        len(cells),
        sum(len(places) < minimum for places in cells.values()),
        len(possible),
        tuple(dict(zip(axes, combination, strict=True)) for combination in missing),
    )


def _determined(rows: Sequence[Axes], one: str, other: str) -> dict[Any, Any] | None:
    """{value on `one`: value on `other`} where the first determines the second, else None.

    Only where every value stands in several rows: a single row determines everything.
    """
    seen: dict[Any, list[Any]] = {}
    for row in rows:
        seen.setdefault(row[one], []).append(row[other])
    sure = all(len(others) > 1 and len(set(others)) == 1 for others in seen.values())
    return {value: others[0] for value, others in seen.items()} if sure else None


def _order(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, then texts by the alphabet."""
    number = isinstance(value, int | float)
    return (not number, float(value) if number else 0.0, str(value))
