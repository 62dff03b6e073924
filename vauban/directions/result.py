"""The measured direction as a frozen value, with save and load.

Knows arrays; `direction_files` knows the file format.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from vauban._arrays import floats
from vauban.directions import direction_files
from vauban.errors import InputError
from vauban.models import Fingerprint

_FORMAT = "vauban.direction/1"


@dataclass(frozen=True, eq=False)
class DirectionResult:
    """Difference in means at every layer, and the one that was chosen.

    Indices: `layer_index` i is the OUTPUT of block i (the tutorial's convention), which is
    residual i + 1 = `residual_index`. Arrays over layers have L rows, row i for block i's output.

    direction       (d,) unit vector, harmful minus harmless
    directions      (L, d) unit rows; norms (L,): raw difference = norms[i] * directions[i]
    means           (2, L, d): harmless, harmful
    cosine_scores   L values, the seed's gap of mean projections (grows with the residual norm)
    scores          per-layer lists: gap, cohens_d, auc, cosine, silhouette (held-out prompts)
    projections     class means along `direction` at the chosen layer, relative to zero

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> sets = ["Rob a shop.", "Forge a ticket."], ["Name a colour.", "Say hello."]
    >>> result = vauban.measure(model, tokenizer, *sets, layer=3)
    >>> result.layer_index, result.residual_index, result.directions.shape, result.means.shape
    (3, 4, (6, 128), (2, 6, 128))
    >>> result.direction.tolist() == result.directions[3].tolist()
    True
    """

    direction: mx.array
    layer_index: int
    cosine_scores: list[float]
    d_model: int
    model_path: str
    directions: mx.array
    norms: mx.array
    means: mx.array
    projections: dict[str, float]
    scores: dict[str, list[float]]
    position: int
    method: str
    provenance: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    fingerprint: Fingerprint | None = None
    """Of the model that was measured; None for a file that an earlier vauban wrote."""

    @property
    def residual_index(self) -> int:
        """The residual that `direction` was measured at: the output of block `layer_index`."""
        return self.layer_index + 1

    def harmless_mean(self, layer: int) -> mx.array:
        """(d,) mean residual of the harmless prompts at the output of block `layer`."""
        if not 0 <= layer < len(self.cosine_scores):
            raise InputError(
                f"layer {layer} does not exist; expected 0 to {len(self.cosine_scores) - 1}"
            )
        return self.means[0, layer]

    def summary(self) -> str:
        low, high = self.projections["harmless"], self.projections["harmful"]
        lines = [
            f"direction of {self.model_path or 'a model'} by {self.method}: output of block "
            f"{self.layer_index} (residual {self.residual_index}), position {self.position}, "
            f"d = {self.d_model}",
            f"class means along it: harmless {low:+.2f}, harmful {high:+.2f}; "
            f"Cohen's d {self.scores['cohens_d'][self.layer_index]:.1f}, "
            f"AUC {self.scores['auc'][self.layer_index]:.3f} on held-out prompts",
        ]
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])

    def to_dict(self) -> dict[str, Any]:
        return {
            "layer_index": self.layer_index,
            "residual_index": self.residual_index,
            "position": self.position,
            "method": self.method,
            "d_model": self.d_model,
            "model_path": self.model_path,
            "norms": floats(self.norms),
            "cosine_scores": list(self.cosine_scores),
            "scores": {name: list(values) for name, values in self.scores.items()},
            "projections": dict(self.projections),
            "provenance": self.provenance,
            "warnings": list(self.warnings),
            "fingerprint": None if self.fingerprint is None else self.fingerprint.facts(),
        }

    def save(self, path: str | Path) -> Path:
        """Write safetensors bytes with the JSON metadata inside; never overwrites half a file.

        Returns the path. It ends in `.vauban` in a model's folder or below, whatever the suffix of
        `path`: the weights are the only `.safetensors` there.
        """
        arrays = {
            "direction": self.direction,
            "directions": self.directions,
            "norms": self.norms,
            "means": self.means,
            **({} if self.fingerprint is None else self.fingerprint.arrays()),
        }
        return direction_files.write(path, _FORMAT, arrays, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> DirectionResult:
        """Read what `save` wrote; InputError names what a foreign or damaged file lacks."""
        arrays, facts = direction_files.read(
            path, _FORMAT, ("direction", "directions", "norms", "means")
        )
        layers, size = arrays["directions"].shape
        if arrays["direction"].shape != (size,) or arrays["means"].shape != (2, layers, size):
            raise InputError(f"{path}: the arrays' shapes do not fit each other")
        return cls(
            direction=arrays["direction"],
            layer_index=facts["layer_index"],
            cosine_scores=facts["cosine_scores"],
            d_model=facts["d_model"],
            model_path=facts["model_path"],
            directions=arrays["directions"],
            norms=arrays["norms"],
            means=arrays["means"],
            projections=facts["projections"],
            scores=facts["scores"],
            position=facts["position"],
            method=facts["method"],
            provenance=facts["provenance"],
            warnings=tuple(facts["warnings"]),
            fingerprint=Fingerprint.read(facts.get("fingerprint"), arrays),
        )


def model_name(tokenizer: Any) -> str:
    """The tokenizer's name_or_path; a Hub snapshot folder is mapped back to org/name."""
    name = str(getattr(tokenizer, "name_or_path", "") or "")
    found = re.search(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]", name + "/")
    return f"{found.group(1)}/{found.group(2)}" if found else name
