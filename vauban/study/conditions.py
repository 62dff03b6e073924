"""The conditions of the study: every method in every scope as run-time interventions.

Frozen values made of fits and choices; runs nothing. Families as in the study's chart: difference
in means, INLP, classifier weights, and what is none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from vauban.config import StudyConfig
from vauban.interventions import Ablate, AblateTo, Add, Erase, Flip, Intervention, Project
from vauban.study.fits import Fits, Key
from vauban.study.matched_choice import Choice, Selected

Family = Literal["difference in means", "INLP", "classifier weights", "other"]
Changes = tuple[Intervention, ...]


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
    remove: Changes
    induce: Changes | None = None
    main: bool = False
    """Whether it stands for its method in the family chart of the study."""

    def to_dict(self) -> dict[str, Any]:
        """What names the condition; the interventions are left out."""
        names = ("name", "method", "family", "scope", "main")
        return {name: getattr(self, name) for name in names}


BASELINE = Condition("baseline", "baseline", "other", "none", (), ())

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


def conditions(
    fits: Fits, choices: Mapping[Selected, Choice], config: StudyConfig
) -> list[Condition]:
    """The baseline, then every condition that the configuration asks for, in its order.

    Methods whose place could not be chosen are left out.
    """
    makers = _Makers(fits, choices, config)
    every = [BASELINE]
    for method in config.study.methods:
        if method not in NEEDED or NEEDED[method] in choices:
            every += getattr(makers, method)()
    names = [c.name for c in every]
    assert len(set(names)) == len(names), names
    return every


@dataclass(frozen=True)
class _Makers:
    """One generator of conditions per method, under the method's name in the configuration."""

    fits: Fits
    choices: Mapping[Selected, Choice]
    config: StudyConfig

    def _scopes(self, chosen: Choice) -> Iterator[tuple[str, Any]]:
        """(scope, its blocks) for every scope that is asked for."""
        for scope in self.config.study.scopes:
            yield scope, chosen.blocks(scope, self.fits.n_layers)

    def ablation(self) -> Iterator[Condition]:
        """h <- h - v (v^T h) of the unit mean difference."""
        chosen = self.choices["ablation"]
        for scope, blocks in self._scopes(chosen):
            yield Condition(
                f"directional ablation, {scope}", "ablation", "difference in means", scope,
                (Ablate(chosen.vector, blocks),), main=scope == "all",
            )  # fmt: skip

    def addition(self) -> Iterator[Condition]:
        return self._additions("ActAdd", "addition", "difference in means")

    def classifier(self) -> Iterator[Condition]:
        return self._additions("classifier ActAdd", "classifier", "classifier weights")

    def _additions(self, name: str, method: Selected, family: Family) -> Iterator[Condition]:
        """h <- h - k v to remove, h + k v to induce, at the residual that v comes from."""
        chosen = self.choices[method]
        for k in self.config.study.scales:
            remove, induce = (Add(chosen.vector, sign * k, chosen.key[1]) for sign in (-1, 1))
            yield Condition(
                f"{name} ±{k:g}", method, family, "local", (remove,), (induce,), main=k == 1.0
            )

    def nullspace(self) -> Iterator[Condition]:
        """h <- P h, P = I - V^T V of INLP in extraction order; P_α at α = 1 is the same.

        `ranks` restricts V to its first rows; "published" is the basis of the study's own code.
        """
        chosen = self.choices["nullspace"]
        rank = chosen.vector.shape[0]

        def projection(what: str, basis: mx.array, scope: str, blocks: Any) -> Condition:
            main = what == f"rank {rank}" and scope == "all"
            return Condition(
                f"null-space projection ({what}), {scope}", "nullspace", "INLP", scope,
                (Project(basis, 1.0, blocks),), main=main,
            )  # fmt: skip

        for scope, blocks in self._scopes(chosen):
            yield projection(f"rank {rank}", chosen.vector, scope, blocks)
        for k in self.config.study.ranks:
            if k < rank:
                yield projection(f"rank {k} of {rank}", chosen.vector[:k], "all", "all")
        if self.config.study.published:
            basis = self.fits.published(chosen.key, self.config.seed)
            if basis.shape[0]:
                yield projection(f"published code, rank {basis.shape[0]}", basis, "all", "all")
        yield Condition(
            "flip at α = 1 (must equal the projection), all", "nullspace", "INLP", "all",
            (Flip(chosen.vector, None, "all", alpha=1.0),),
        )  # fmt: skip

    def flip(self) -> Iterator[Condition]:
        """P_2 = I - 2 V^T V, each stream reflected once; about the origin, and about the midpoint.

        "repeated" reflects at the input of every block of the scope and at its terms, as the
        published code does for layers without repetition; two reflections of one stream undo each
        other.
        """
        chosen = self.choices["nullspace"]
        pairs = [self.fits.means((chosen.key[0], r)) for r in range(self.fits.n_layers)]
        midpoints = {residual: (low + high) / 2 for residual, (low, high) in enumerate(pairs)}
        for scope, blocks in self._scopes(chosen):
            forms: dict[str, Changes] = {
                f"flip α = 2, {scope}": (Project(chosen.vector, 2.0, blocks),),
                f"affine flip α = 2, {scope}": (Flip(chosen.vector, midpoints, blocks),),
            }
            if scope != "local":
                each = range(self.fits.n_layers) if blocks == "all" else blocks
                forms[f"flip α = 2 repeated, {scope}"] = tuple(
                    Project(chosen.vector, 2.0, [block]) for block in each
                )
            for number, (name, changes) in enumerate(forms.items()):
                method = "affine flip" if name.startswith("affine") else "flip"
                main = scope == "all" and number == 0
                yield Condition(name, method, "INLP", scope, changes, changes, main)

    def leace(self) -> Iterator[Condition]:
        """r(h) = h - δ a^T (h - μ), one eraser per residual (Belrose et al. 2023)."""
        chosen = self.choices["ablation"]
        for scope, blocks in self._scopes(chosen):
            places = [
                (chosen.key[0], residual)
                for residual in (range(1, self.fits.n_layers) if blocks == "all" else blocks)
            ]
            erasers = {key[1]: self.fits.leace(key) for key in places if self._apart(key)}
            if erasers:
                yield Condition(f"LEACE, {scope}", "leace", "other", scope, (Erase(erasers),))

    def _apart(self, key: Key) -> bool:
        """Whether the class means differ by more than rounding at a place."""
        low, high = self.fits.means(key)
        size = max(float(mx.linalg.norm(low)), float(mx.linalg.norm(high)))
        return float(mx.linalg.norm(high - low)) > 1e-6 * size

    def affine(self) -> Iterator[Condition]:
        """h <- h - v (v^T h) + v (v^T harmless mean of the residual) (ACE at strength 0)."""
        chosen = self.choices["ablation"]
        unit = chosen.vector / mx.linalg.norm(chosen.vector)
        values = {
            residual: float((self.fits.means((chosen.key[0], residual))[0] * unit).sum())
            for residual in range(self.fits.n_layers)
        }
        for scope, blocks in self._scopes(chosen):
            layers = list(range(self.fits.n_layers)) if blocks == "all" else blocks
            change = AblateTo(chosen.vector, values, layers)
            yield Condition(f"affine ablation, {scope}", "affine", "other", scope, (change,))

    def random(self) -> Iterator[Condition]:
        """The control: a seeded Gaussian direction, ablated everywhere."""
        d = self.fits.activations.values.shape[-1]
        noise = np.random.default_rng(self.config.seed).normal(size=d).astype(np.float32)
        change = Ablate(mx.array(noise))
        yield Condition("random direction, all", "random", "other", "all", (change,))
