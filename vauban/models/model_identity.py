"""A model's fingerprint: its shape, its tokenizer, and a few of its numbers.

A direction carries that of the model it was measured on, so that using it on another is seen. Knows
models and tokenizers; knows no direction's inside.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban._arrays import unpack
from vauban.errors import InputError, VaubanWarning
from vauban.models.anatomy import anatomy
from vauban.models.notes import notes
from vauban.models.writers import Writer, residual_writers

# Rows and columns of a matrix that are kept, from three blocks and the embedding.
_ROWS, _COLUMNS = 8, 32
# Half precision rounds a number by a thousandth or two; another training moves it further.
_ROUNDED = 4e-3
# One model in two packings; matrices of two models are 1.4 apart.
_ANOTHER_PACKING = 0.5
_TOKENS = 257
_CURE = "to use it all the same pass its array, result.direction"


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What tells a model from another.

    blocks, width, vocabulary   its shape
    packing    how its matrices are stored, or were before they were unpacked; None for floats
    tokenizer  a digest of its size, special tokens and some of its entries; "" without one
    norms      numbers of its norms, which every conversion keeps
    matrices   numbers of its residual writers and its embedding, unpacked
    """

    family: str
    blocks: int
    width: int
    vocabulary: int
    packing: str | None
    tokenizer: str
    norms: mx.array
    matrices: mx.array

    def facts(self) -> dict[str, Any]:
        """Everything but the numbers, JSON-safe."""
        return {
            "family": self.family,
            "blocks": self.blocks,
            "width": self.width,
            "vocabulary": self.vocabulary,
            "packing": self.packing,
            "tokenizer": self.tokenizer,
        }

    def arrays(self) -> dict[str, mx.array]:
        """The numbers, by the names that a direction's file has for them."""
        return {"fingerprint.norms": self.norms, "fingerprint.matrices": self.matrices}

    @classmethod
    def read(
        cls, facts: Mapping[str, Any] | None, arrays: Mapping[str, mx.array]
    ) -> Fingerprint | None:
        """What `facts` and `arrays` gave; None for a file that holds none."""
        if not facts or "fingerprint.norms" not in arrays:
            return None
        return cls(
            **facts,
            norms=arrays["fingerprint.norms"],
            matrices=arrays["fingerprint.matrices"],
        )

    @property
    def text(self) -> str:
        """The shape in words."""
        return (
            f"a {self.family} of {self.blocks} blocks, width {self.width}, {self.vocabulary} tokens"
        )


def fingerprint(model: nn.Module, tokenizer: Any = None) -> Fingerprint:
    """The fingerprint of a model: a few thousand numbers, the same in every float type.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> fingerprint(model, tokenizer).width
    128
    """
    parts = anatomy(model)
    writers = residual_writers(model)
    modules = dict(model.named_modules())
    chosen = {-1, 0, parts.n_layers // 2, parts.n_layers - 1}
    taken: dict[tuple[int, str], Writer] = {}
    for writer in writers:
        if writer.layer in chosen:
            taken.setdefault((writer.layer, writer.kind), writer)
    norms = [value for block in (0, parts.n_layers - 1) for value in _norms(parts.layers[block])]
    packing = (notes(model).source or {}).get("quantization") or next(
        (f"{m.bits}-bit {getattr(m, 'mode', 'affine')} g{m.group_size}" for m in modules.values()
         if "scales" in m and hasattr(m, "bits")),
        None,
    )  # fmt: skip
    return Fingerprint(
        str(getattr(model, "model_type", type(model).__name__)),
        parts.n_layers,
        parts.d_model,
        parts.vocabulary,
        packing,
        tokenizer_digest(tokenizer),
        _joined(norms),
        _joined([_sample(modules[writer.path]) for writer in taken.values()]),
    )


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of a tokenizer: size, special tokens, and entries spread over the vocabulary."""
    if tokenizer is None or not hasattr(tokenizer, "convert_ids_to_tokens"):
        return ""
    size = len(tokenizer.get_vocab()) if not hasattr(tokenizer, "__len__") else len(tokenizer)
    ids = sorted({int(i) for i in np.linspace(0, size - 1, min(size, _TOKENS))})
    special = [getattr(tokenizer, f"{name}_token", None) for name in ("bos", "unk", "pad")]
    facts = [size, tokenizer.convert_ids_to_tokens(ids), special]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]


def check_measured_on(result: Any, model: nn.Module, tokenizer: Any = None) -> None:
    """A VaubanWarning where `result` was measured on other weights than `model` has.

    Raises InputError where the shapes or the tokenizers differ. Silent for an array and for a
    direction from a file without a fingerprint; a 4-bit conversion of the measured model, or the
    floats that it came from, pass as the same model.
    """
    kept: Fingerprint | None = getattr(result, "fingerprint", None)
    if not isinstance(kept, Fingerprint):
        return
    here = fingerprint(model, tokenizer)
    if (kept.blocks, kept.width) != (here.blocks, here.width):
        raise InputError(
            f"the direction was measured on {kept.text}; this model is {here.text}. Measure it "
            f"here, or {_CURE}"
        )
    check_tokenizer(result, tokenizer)
    if notes(model).edited:
        # Edited by a plan in this process: that it changed is known.
        return
    limit = _ROUNDED if kept.packing == here.packing else _ANOTHER_PACKING
    norms, matrices = _apart(kept.norms, here.norms), _apart(kept.matrices, here.matrices)
    if norms > _ROUNDED or matrices > limit:
        warnings.warn(
            f"the direction was measured on other weights: {getattr(result, 'model_path', '')!r} "
            f"and this model have one shape, but their numbers differ by {max(norms, matrices):.1%}"
            "; refusal may lie elsewhere here",
            VaubanWarning,
            stacklevel=3,
        )


def check_tokenizer(result: Any, tokenizer: Any) -> None:
    """InputError where `result` was measured through another tokenizer than this one."""
    kept: Fingerprint | None = getattr(result, "fingerprint", None)
    if not isinstance(kept, Fingerprint) or not kept.tokenizer:
        return
    if tokenizer_digest(tokenizer) not in ("", kept.tokenizer):
        raise InputError(
            f"the direction was measured on {kept.text} with another tokenizer than this model's; "
            f"its position means another token here. Measure it here, or {_CURE}"
        )


def _norms(block: nn.Module) -> list[mx.array]:
    """The gains of a block's norms, at most two of them."""
    gains = [
        module.weight[:_COLUMNS]
        for _, module in sorted(block.named_modules())
        if "weight" in module and module.weight.ndim == 1
    ]
    return gains[:2]


def _sample(module: nn.Module) -> mx.array:
    """Some rows and columns of a matrix, unpacked; of stacked experts those of the first."""
    parts = {name: module.get(name) for name in ("weight", "scales", "biases")}
    while parts["weight"] is not None and parts["weight"].ndim > 2:
        parts = {name: None if v is None else v[0] for name, v in parts.items()}
    weight = parts["weight"]
    if weight is None:
        return mx.zeros((0,))
    rows = mx.array(np.linspace(0, weight.shape[0] - 1, min(_ROWS, weight.shape[0])).astype(int))
    taken = {name: None if v is None else v[rows] for name, v in parts.items()}
    values, scales = taken["weight"], taken["scales"]
    assert values is not None
    if scales is not None and hasattr(module, "bits"):
        mode = getattr(module, "mode", "affine")
        values = unpack(values, scales, taken["biases"], module.group_size, module.bits, mode)
    columns = np.linspace(0, values.shape[1] - 1, min(_COLUMNS, values.shape[1])).astype(int)
    return values[:, mx.array(columns)].astype(mx.float32).reshape(-1)


def _joined(values: list[mx.array]) -> mx.array:
    flat = [value.astype(mx.float32).reshape(-1) for value in values]
    return mx.concatenate(flat) if flat else mx.zeros((0,))


def _apart(a: mx.array, b: mx.array) -> float:
    """‖a - b‖/‖a‖; 1 where they are not of one size."""
    if a.shape != b.shape:
        return 1.0
    size = float(mx.linalg.norm(a)) if a.size else 0.0
    return float(mx.linalg.norm(a - b)) / size if size else 0.0
