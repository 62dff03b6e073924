"""What was edited: facts, values, keys and factors of every batch, saved and read again.

Knows arrays and files; runs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from vauban._arrays import as_numpy, load_arrays, save_arrays
from vauban.errors import InputError, shown
from vauban.knowledge.facts import Fact

LEDGER_FILE = "edits.vauban"
STOPS = ("loss", "argmax")
FILTERS = ("rect", "prune", "sphere", "project")
EDIT_METHODS = ("memit_seq", "memit", "alphaedit", "encore", "betaedit", "ridge", "rome", "emmet")


@dataclass(frozen=True)
class EditSettings:
    """How facts are edited.

    method        "memit_seq" (MEMIT with the keys of earlier edits), "memit", "alphaedit",
                  "encore", "betaedit", "ridge", "rome", "emmet"
    layers        ascending blocks, the last one is where the value is trained; "auto" traces
    steps, lr, weight_decay, kl_factor, clamp, stop   training of a value: Adam steps, the penalty
                  on ‖δ‖/‖h0‖², the weight of the KL term, the bound on ‖δ‖/‖h0‖, and whether a fact
                  is learnt at a loss of 0.05 or when its target is the likeliest answer ("argmax")
    keep          continuations of the subject, in the model's own words, that stay as likely as
                  they are, each at the price of kl_factor; 0 is the published form
    lam, lam_n, tau, rank, energy, l2   the penalty (`penalty`), where the method has them
    norm_anchor   scale what the MLP is to write to the mean size of the values so far (NAS)
    batch_size    facts that are solved together
    filter        None, or what an update goes through: "rect", "sphere", "project" ("+P": without
                  the directions that tau, rank or energy protect) on each batch's, "prune" on the
                  sum of all

    Raises InputError for what cannot be.

    >>> EditSettings(method="alphaedit", layers=[2, 3], energy=0.9).keeps_history
    True
    """

    method: str = "memit_seq"
    layers: str | Sequence[int] = "auto"
    steps: int = 25
    lr: float = 0.5
    weight_decay: float = 0.5
    kl_factor: float = 0.0625
    clamp: float = 0.75
    lam: float | str = "auto"
    lam_n: float = 20.0
    tau: float = 0.02
    rank: int | None = None
    energy: float | None = None
    l2: float | str = "auto"
    stop: str = "loss"
    norm_anchor: bool = False
    batch_size: int = 10
    seed: int = 0
    filter: str | None = None
    keep: int = 0

    def __post_init__(self) -> None:
        if self.method not in EDIT_METHODS:
            raise InputError(
                f"method is {shown(self.method)}; expected one of {', '.join(EDIT_METHODS)}"
            )
        if self.stop not in STOPS:
            raise InputError(f"stop is {shown(self.stop)}; expected one of {', '.join(STOPS)}")
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {shown(value)}; expected a whole number above 0")
        if not isinstance(self.keep, int) or self.keep < 0:
            raise InputError(f"keep is {shown(self.keep)}; expected a whole number, 0 or more")
        if self.filter is not None and self.filter not in FILTERS:
            raise InputError(
                f"filter is {shown(self.filter)}; expected one of {', '.join(FILTERS)}"
            )
        for name in ("lam", "l2"):
            value = getattr(self, name)
            if isinstance(value, str) and value != "auto":
                raise InputError(f"{name} is {shown(value)}; expected 'auto' or a number above 0")
        for name in ("lr", "clamp", "lam"):
            if getattr(self, name) != "auto" and not getattr(self, name) > 0:
                raise InputError(f"{name} is {shown(getattr(self, name))}; expected above 0")
        for name in ("weight_decay", "kl_factor"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is {shown(getattr(self, name))}; expected 0 or more")
        if not isinstance(self.layers, str):
            object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        elif self.layers != "auto":
            raise InputError(f"layers is {shown(self.layers)}; expected 'auto' or block indices")

    @property
    def keeps_history(self) -> bool:
        """Whether the keys of earlier edits are kept as they are."""
        return self.method in ("memit_seq", "alphaedit", "encore", "betaedit")

    def of_penalty(self) -> dict[str, Any]:
        """Method and settings for `penalty`."""
        method = {"memit_seq": "memit", "rome": "memit", "emmet": "encore"}.get(
            self.method, self.method
        )
        bound = self.of_protection()
        every: dict[str, dict[str, Any]] = {
            "memit": {"lam": self.lam},
            "encore": {"lam": self.lam, "lam_n": self.lam_n},
            "alphaedit": {**bound, "l2": self.l2},
            "betaedit": {**bound, "l2": self.l2, "lam": self.lam},
            "ridge": {"l2": self.l2},
        }
        return {"method": method, **every[method]}

    def of_protection(self) -> dict[str, Any]:
        """Which directions are protected, for `penalty` and `protected_directions`."""
        if self.rank is None and self.energy is None:
            return {"tau": self.tau}
        return {"rank": self.rank, "energy": self.energy}

    def to_dict(self) -> dict[str, Any]:
        """Every setting."""
        layers = self.layers if isinstance(self.layers, str) else list(self.layers)
        return {**asdict(self), "layers": layers}


@dataclass(frozen=True, eq=False)
class LedgerBatch:
    """Facts that were solved together.

    `values` z and `plain` h0 are (u, d); by block `keys` K (u, d0), those after the edit (`kept`),
    and the factors of the update, Δ = residualsᵀ rows (the identity and Δ where a filter leaves no
    thin factors).
    """

    facts: tuple[Fact, ...]
    values: np.ndarray
    plain: np.ndarray
    keys: Mapping[int, np.ndarray]
    kept: Mapping[int, np.ndarray]
    residuals: Mapping[int, np.ndarray]
    rows: Mapping[int, np.ndarray]

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(str(fact.id) for fact in self.facts)

    def delta(self, layer: int) -> np.ndarray:
        """Δ (d1, d0) of a block."""
        product: np.ndarray = self.residuals[layer].T @ self.rows[layer]
        return product


@dataclass(eq=False)
class Ledger:
    """Everything that was done to a model, in order: what `undo` and `replay` need.

    >>> ledger = Ledger(EditSettings(layers=[2]))
    >>> ledger.facts, ledger.contexts
    ([], ('{}',))
    """

    settings: EditSettings
    contexts: tuple[str, ...] = ("{}",)
    layers: tuple[int, ...] = ()
    digests: dict[int, str] = field(default_factory=dict)
    batches: list[LedgerBatch] = field(default_factory=list)
    source: str = ""
    """The model that an exported folder was made from."""

    @property
    def facts(self) -> list[Fact]:
        """All facts that are in the weights, in order."""
        return [fact for batch in self.batches for fact in batch.facts]

    def summary(self) -> str:
        return f"{len(self.facts)} facts in {len(self.batches)} batches, blocks {self.layers}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "settings": self.settings.to_dict(),
            "contexts": list(self.contexts),
            "layers": list(self.layers),
            "source": self.source,
            "digests": {str(layer): digest for layer, digest in self.digests.items()},
            "batches": [[fact.to_dict() for fact in batch.facts] for batch in self.batches],
        }

    def save(self, path: str | Path) -> Path:
        """Write one file of safetensors bytes, as a whole or not at all."""
        path = Path(path).expanduser()
        arrays: dict[str, mx.array] = {}
        for number, batch in enumerate(self.batches):
            named = {"values": batch.values, "plain": batch.plain}
            for part in ("keys", "kept", "residuals", "rows"):
                named |= {f"{part}.{layer}": a for layer, a in getattr(batch, part).items()}
            arrays |= {f"{number}.{n}": mx.array(a.astype(np.float32)) for n, a in named.items()}
        # safetensors holds at least one array.
        arrays = arrays or {"empty": mx.zeros(1)}
        save_arrays(path, arrays, {"ledger": json.dumps(self.to_dict())})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Ledger:
        """Read what `save` wrote; a folder stands for its ledger. InputError for another file."""
        path = Path(path).expanduser()
        path = path / LEDGER_FILE if path.is_dir() else path
        if not path.is_file():
            raise InputError(f"{path}: no such file; expected the ledger of edited facts")
        try:
            arrays, metadata = load_arrays(path)
            facts = json.loads(metadata["ledger"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"{path}: this is no ledger ({error})") from error
        layers = tuple(facts["layers"])
        digests = {int(layer): digest for layer, digest in facts["digests"].items()}
        ledger = cls(EditSettings(**facts["settings"]), tuple(facts["contexts"]), layers, digests)
        ledger.source = facts["source"]

        def array(name: str) -> np.ndarray:
            return as_numpy(arrays[name]).astype(np.float64)

        for number, rows in enumerate(facts["batches"]):
            by_layer = [
                {layer: array(f"{number}.{part}.{layer}") for layer in layers}
                for part in ("keys", "kept", "residuals", "rows")
            ]
            ledger.batches.append(
                LedgerBatch(
                    tuple(Fact(**row) for row in rows),
                    array(f"{number}.values"),
                    array(f"{number}.plain"),
                    *by_layer,
                )
            )
        return ledger
