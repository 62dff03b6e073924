"""The embedding and its head: what becomes of a shared matrix, and giving the head its own copy.

How a head reads the matrix is found by running the model's own code around a trunk that puts out a
made-up state: no weight is read. Knows mlx-lm classes and their switches; cuts nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from vauban.errors import InputError
from vauban.models import Swap, anatomy, forget, set_aside, swapped

EmbeddingMode = Literal["auto", "untie", "tied"] | bool
Reader = Literal["embedding", "matrix", "head", "unseen"]
_SHOWN = 8


@dataclass(frozen=True, eq=False)
class HeadReading:
    """Who turned the trunk's output into logits, and what came out for a made-up state.

    `reader` is "embedding" (through `as_linear`), "matrix" (the embedding's matrix, read
    directly), "head" (an `lm_head` of its own) or "unseen": inside the trunk, or a head of another
    name. `logits` are those of a matrix with ones on its diagonal.
    """

    reader: Reader
    logits: mx.array | None

    @property
    def shared(self) -> bool:
        """Whether the head was seen to read the embedding's matrix."""
        return self.reader in ("embedding", "matrix")


def read_head(model: nn.Module) -> HeadReading:
    """How `model` computes its logits. Reads no weights; the model is left as it was.

    "unseen" as well where the model's own code fails around the made-up trunk.
    """
    parts = anatomy(model)
    state = mx.random.normal((1, 1, parts.d_model), key=mx.random.key(0))
    seen: list[Reader] = []

    def reads(reader: Reader) -> Any:
        def call(self: Any, h: mx.array) -> mx.array:
            seen.append(reader)
            return h[..., :_SHOWN]

        return call

    def matrix(self: Any) -> mx.array:
        seen.append("matrix")
        return mx.eye(_SHOWN, parts.d_model)

    swaps: list[Swap] = [
        (parts.trunk, {"__call__": lambda self, *args, **options: state}),
        (parts.embedding, {"as_linear": reads("embedding"), "weight": property(matrix)}),
    ]
    if parts.head_path is not None:
        head = dict(model.named_modules())[parts.head_path]
        swaps.append((head, {"__call__": reads("head")}))
    with swapped(swaps):
        try:
            logits = model(mx.array([[1]]))
        except (AttributeError, TypeError, ValueError, KeyError, IndexError):
            # A trunk that hands on more than one state: nothing was seen, and that is said.
            return HeadReading("unseen", None)
    return HeadReading(seen[0], logits) if len(seen) == 1 else HeadReading("unseen", None)


def is_tied(model: nn.Module) -> bool:
    """Whether the embedding's matrix is the head's as well, whatever other heads lie about."""
    reading = read_head(model)
    return anatomy(model).tied if reading.reader == "unseen" else reading.shared


def has_untie_switch(model: nn.Module) -> bool:
    """Whether a tied model gives the same logits with a head of its own.

    Its class must have the switch, `args.tie_word_embeddings` and an `lm_head`, and must treat both
    heads alike: Falcon H1 and MiniCPM 3 scale the logits of a tied head in another way. Reads no
    weights; the model is left as it was.
    """
    args = getattr(model, "args", None)
    if not hasattr(args, "tie_word_embeddings"):
        return False
    if "self.lm_head" not in inspect.getsource(type(model)):
        return False
    tied = read_head(model)
    if tied.logits is None or not tied.shared:
        return False
    with _untied(model):
        separate = read_head(model)
    return (
        separate.reader == "head"
        and separate.logits is not None
        and separate.logits.shape == tied.logits.shape
        and bool(mx.allclose(separate.logits, tied.logits, rtol=1e-3, atol=1e-6))
    )


@contextmanager
def _untied(model: nn.Module) -> Iterator[None]:
    """The switch set for the time of a `with` block, with a head that holds nothing."""
    before = _switches(model)
    had, old = hasattr(model, "lm_head"), getattr(model, "lm_head", None)
    model.lm_head = nn.Linear(1, 1, bias=False)
    try:
        _set_switches(model, dict.fromkeys(before, False))
        with set_aside(model):
            yield
    finally:
        _set_switches(model, before)
        # Some families say with `lm_head = None` that they are tied.
        if had:
            model.lm_head = old
        else:
            del model.lm_head


def _switches(model: Any) -> dict[str, bool]:
    """The values of the switch: of the arguments, and of the model where it has a copy."""
    switches = {"args": bool(model.args.tie_word_embeddings)}
    if hasattr(model, "tie_word_embeddings"):
        switches["model"] = bool(model.tie_word_embeddings)
    return switches


def _set_switches(model: Any, values: dict[str, bool]) -> None:
    model.args.tie_word_embeddings = values["args"]
    if "model" in values:
        model.tie_word_embeddings = values["model"]


def embedding_mode(
    model: nn.Module, embedding: EmbeddingMode, *, wanted: bool
) -> Literal["cut", "untie", "tied", "kept"]:
    """What happens to the table: "cut", "untie", "tied" or "kept" (see `plan_cut`).

    `wanted`: whether "auto" is to cut a table of its own. A shared one it keeps.
    """
    if embedding not in ("auto", "untie", "tied", True, False):
        raise InputError(f"embedding is {embedding!r}; expected 'auto', 'untie', 'tied' or False")
    if embedding is False or (embedding == "auto" and not wanted):
        return "kept"
    if not is_tied(model):
        return "cut"
    if embedding == "auto":
        return "kept"
    if embedding == "tied":
        return "tied"
    if has_untie_switch(model):
        return "untie"
    if embedding == "untie":
        raise InputError(
            f"{type(model).__module__} has no switch that gives its head a copy of the embedding "
            "and leaves the logits as they are; use embedding='tied'"
        )
    return "tied"


def untie(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Give the head its own copy of the embedding matrix, in its own packing.

    A model whose head has its own already is left alone: its embedding may have been cut.
    """
    if not is_tied(model):
        return
    model.lm_head = head_from_embedding(anatomy(model).embedding)
    _set_switches(model, dict.fromkeys(_switches(model), False))
    forget(model)
    modules["lm_head"] = model.lm_head


def head_from_embedding(embedding: nn.Module) -> nn.Module:
    """A linear head that computes `embedding.as_linear`."""
    if isinstance(embedding, nn.QuantizedEmbedding):
        head = nn.QuantizedLinear(
            embedding.group_size,
            32,
            bias=False,
            group_size=embedding.group_size,
            bits=embedding.bits,
            mode=getattr(embedding, "mode", "affine"),
        )
        for name in ("weight", "scales", "biases"):
            if name in embedding:
                head[name] = embedding[name]
        return head
    plain = nn.Linear(1, 1, bias=False)
    plain.weight = embedding.weight
    return plain
