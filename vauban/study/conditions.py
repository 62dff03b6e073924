"""The conditions of the study: every method in every scope as run-time interventions.

Frozen values made of fits and choices; runs nothing. Families as in the study's chart: difference
in means, INLP, classifier weights, and what is none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from vauban._common import RELATIVE_NOISE
from vauban.config import StudyConfig
from vauban.directions import LeaceResult
from vauban.interventions import Ablate, AblateTo, Add, Erase, Flip, Intervention, Project
from vauban.study.choose import Choice, Selected
from vauban.study.fits import Fits, Key

Family = Literal["difference in means", "INLP", "classifier weights", "other"]


@dataclass(frozen=True, eq=False)
class Condition:
    """One intervention in one scope.

    `remove` is meant to take refusal away and is measured on everything; `induce`, where the
    method has one, is meant to bring it about and is measured on harmless prompts.
    """

    name: str
    method: str
    family: Family
    scope: str
    remove: tuple[Intervention, ...]
    induce: tuple[Intervention, ...] | None = None
    main: bool = False
    """Whether it stands for its method in the family chart of the study."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "method": self.method,
            "family": self.family,
            "scope": self.scope,
            "main": self.main,
        }


BASELINE = Condition("baseline", "baseline", "other", "none", (), ())


def conditions(
    fits: Fits, choices: Mapping[Selected, Choice], config: StudyConfig
) -> list[Condition]:
    """The baseline, then every condition that the configuration asks for, in its order.

    Methods whose place could not be chosen are left out.
    """
    found = [BASELINE]
    for method in config.study.methods:
        if method not in NEEDED or NEEDED[method] in choices:
            found += _MAKERS[method](fits, choices, config)
    names = [c.name for c in found]
    assert len(set(names)) == len(names), names
    return found


def _ablation(
    fits: Fits, choices: Mapping[Selected, Choice], config: StudyConfig
) -> Iterator[Condition]:
    """h <- h - v (v^T h) of the unit mean difference."""
    chosen = choices["ablation"]
    for scope in config.study.scopes:
        change = Ablate(chosen.vector, chosen.blocks(scope, fits.n_layers))
        yield Condition(
            f"directional ablation, {scope}", "ablation", "difference in means", scope, (change,),
            main=scope == "all",
        )  # fmt: skip


def _addition(
    fits: Fits, choices: Mapping[Selected, Choice], config: StudyConfig
) -> Iterator[Condition]:
    yield from _additions("ActAdd", "addition", "difference in means", choices, config)


def _classifier(
    fits: Fits, choices: Mapping[Selected, Choice], config: StudyConfig
) -> Iterator[Condition]:
    yield from _additions("classifier ActAdd", "classifier", "classifier weights", choices, config)


def _additions(
    name: str, method: Selected, family: Family, choices: Mapping[Selected, Choice],
    config: StudyConfig,
) -> Iterator[Condition]:  # fmt: skip
    """h <- h - k v to remove, h + k v to induce, at the residual that v comes from."""
    chosen = choices[method]
    for k in config.study.scales:
        yield Condition(
            f"{name} ±{k:g}", method, family, "local",
            (Add(chosen.vector, -k, chosen.key[1]),), (Add(chosen.vector, k, chosen.key[1]),),
            main=k == 1.0,
        )  # fmt: skip


def _nullspace(
    fits: Fits, choices: Mapping[Selected, Choice], config: StudyConfig
) -> Iterator[Condition]:
    """h <- P h, P = I - V^T V of INLP in extraction order; P_α at α = 1 is the same by another way.

    `rank` restricts V to its first rows; "published" is the basis of the study's own code.
    """
    chosen = choices["nullspace"]
    rank = chosen.vector.shape[0]
    for scope in config.study.scopes:
        blocks = chosen.blocks(scope, fits.n_layers)
        yield Condition(
            f"null-space projection (rank {rank}), {scope}", "nullspace", "INLP", scope,
            (Project(chosen.vector, 1.0, blocks),), main=scope == "all",
        )  # fmt: skip
    for k in config.study.ranks:
        if k < rank:
            yield Condition(
                f"null-space projection (rank {k} of {rank}), all", "nullspace", "INLP", "all",
                (Project(chosen.vector[:k], 1.0),),
            )  # fmt: skip
    published = fits.published(chosen.key, config.seed) if config.study.published else None
    if published is not None and published.shape[0]:
        yield Condition(
            f"null-space projection (published code, rank {published.shape[0]}), all", "nullspace",
            "INLP", "all", (Project(published, 1.0),),
        )  # fmt: skip
    yield Condition(
        "flip at α = 1 (must equal the projection), all", "nullspace", "INLP", "all",
        (Flip(chosen.vector, None, "all", alpha=1.0),),
    )  # fmt: skip


def _flip(
    fits: Fits, choices: Mapping[Selected, Choice], config: StudyConfig
) -> Iterator[Condition]:
    """P_2 = I - 2 V^T V, each stream reflected once; about the origin, and about the midpoint.

    "repeated" reflects at the input of every block of the scope and at its terms, as the published
    code does for layers without repetition; two reflections of one stream undo each other.
    """
    chosen = choices["nullspace"]
    midpoints = _midpoints(fits, chosen.key)
    for scope in config.study.scopes:
        blocks = chosen.blocks(scope, fits.n_layers)
        linear, affine = Project(chosen.vector, 2.0, blocks), Flip(chosen.vector, midpoints, blocks)
        yield Condition(
            f"flip α = 2, {scope}", "flip", "INLP", scope, (linear,), (linear,),
            main=scope == "all",
        )  # fmt: skip
        yield Condition(
            f"affine flip α = 2, {scope}", "affine flip", "INLP", scope, (affine,), (affine,)
        )
        if scope != "local":
            each = range(fits.n_layers) if blocks == "all" else blocks
            repeated = tuple(Project(chosen.vector, 2.0, [block]) for block in each)
            yield Condition(
                f"flip α = 2 repeated, {scope}", "flip", "INLP", scope, repeated, repeated
            )


def _leace(
    fits: Fits, choices: Mapping[Selected, Choice], config: StudyConfig
) -> Iterator[Condition]:
    """r(h) = h - δ a^T (h - μ), one eraser per residual (Belrose et al. 2023)."""
    chosen = choices["ablation"]
    position = chosen.key[0]
    for scope in config.study.scopes:
        blocks = chosen.blocks(scope, fits.n_layers)
        wanted = range(1, fits.n_layers) if blocks == "all" else blocks
        erasers: dict[int, LeaceResult] = {
            r: fits.leace((position, r)) for r in wanted if _apart(fits, (position, r))
        }
        if erasers:
            yield Condition(
                f"LEACE, {scope}", "leace", "other", scope, (Erase(erasers),)
            )  # fmt: skip


def _affine(
    fits: Fits, choices: Mapping[Selected, Choice], config: StudyConfig
) -> Iterator[Condition]:
    """h <- h - v (v^T h) + v (v^T harmless mean of the residual) (ACE at strength 0)."""
    chosen = choices["ablation"]
    unit = chosen.vector / mx.linalg.norm(chosen.vector)
    values = {
        r: float((fits.means((chosen.key[0], r))[0] * unit).sum()) for r in range(fits.n_layers)
    }
    for scope in config.study.scopes:
        blocks = chosen.blocks(scope, fits.n_layers)
        wanted = list(range(fits.n_layers)) if blocks == "all" else blocks
        yield Condition(
            f"affine ablation, {scope}", "affine", "other", scope,
            (AblateTo(chosen.vector, values, wanted),),
        )  # fmt: skip


def _random(
    fits: Fits, choices: Mapping[Selected, Choice], config: StudyConfig
) -> Iterator[Condition]:
    """The control: a seeded Gaussian direction, ablated everywhere."""
    d = fits.activations.values.shape[-1]
    noise = np.random.default_rng(config.seed).normal(size=d).astype(np.float32)
    yield Condition(
        "random direction, all", "random", "other", "all", (Ablate(mx.array(noise)),)
    )  # fmt: skip


_MAKERS: dict[str, Callable[..., Iterator[Condition]]] = {
    "ablation": _ablation,
    "addition": _addition,
    "nullspace": _nullspace,
    "flip": _flip,
    "classifier": _classifier,
    "leace": _leace,
    "affine": _affine,
    "random": _random,
}

NEEDED: Mapping[str, Selected] = {
    "ablation": "ablation",
    "leace": "ablation",
    "affine": "ablation",
    "addition": "addition",
    "nullspace": "nullspace",
    "flip": "nullspace",
    "classifier": "classifier",
}
"""Which choice a method stands on; a random direction needs none."""


def _midpoints(fits: Fits, key: Key) -> dict[int, mx.array]:
    """{residual: halfway between the class means} at the chosen position."""
    points = {}
    for residual in range(fits.n_layers):
        low, high = fits.means((key[0], residual))
        points[residual] = (low + high) / 2
    return points


def _apart(fits: Fits, key: Key) -> bool:
    """Whether the class means differ by more than rounding at a place."""
    low, high = fits.means(key)
    size = max(float(mx.linalg.norm(low)), float(mx.linalg.norm(high)))
    return float(mx.linalg.norm(high - low)) > RELATIVE_NOISE * size
