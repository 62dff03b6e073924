"""What has been learnt about one model: found once, kept on it, dropped when its modules change.

All of it stands in one frozen value under one attribute of the model, where no parameter tree sees
it. Knows no module's inside; each fact is found by the file that its comment names.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.nn as nn

from vauban.errors import VaubanWarning

if TYPE_CHECKING:
    from vauban.claims import Claim
    from vauban.models.anatomy import Anatomy
    from vauban.models.forward import BatchCheck, RowChecks
    from vauban.models.parity import ForwardCheck
    from vauban.models.taps import Place

_ATTRIBUTE = "_vauban_notes"


@dataclass(frozen=True, eq=False)
class Notes:
    """The facts about a model; None where nobody has asked yet."""

    # loading: where the weights came from, and what of a `ModelInfo` stays true after an edit.
    folder: Path | None = None
    source: Mapping[str, Any] | None = None
    # configuration_claims, configuration_translation: what the class does not take up of its
    # config.json, and what it was told under another name.
    claims: tuple[Claim, ...] = ()
    translated: tuple[str, ...] = ()
    window_named: bool = False
    # apply: modules that a plan has edited in memory, with a digest of what was done.
    edited: Mapping[str, str] = field(default_factory=dict)
    # anatomy: where the parts are.
    anatomy: Anatomy | None = None
    # parity: the proven path, and what the explicit loop must know about the blocks.
    check: ForwardCheck | None = None
    place: Place = 0
    extras: tuple[int, ...] = ()
    several_streams: bool = False
    # forward, generation: what the rows of a batch may share.
    rows: RowChecks | None = None
    batches: BatchCheck | None = None
    joins: BatchCheck | None = None
    # walk: after how many blocks the stream is evaluated.
    stride: int | None = None
    # batching: what a token of a prompt takes in the caches.
    cache_bytes: int | None = None


def notes(model: nn.Module) -> Notes:
    """What is known of `model`; empty notes for one that nobody has looked at."""
    known: Notes | None = getattr(model, _ATTRIBUTE, None)
    return known or Notes()


def note(model: nn.Module, **facts: Any) -> None:
    """Add facts to what is known of `model`."""
    object.__setattr__(model, _ATTRIBUTE, replace(notes(model), **facts))


def forget(model: nn.Module) -> None:
    """Drop what was learnt from the modules, after they have changed; the source stays."""
    before = notes(model)
    kept = ("folder", "source", "claims", "translated", "window_named", "edited")
    object.__setattr__(model, _ATTRIBUTE, Notes(**{name: getattr(before, name) for name in kept}))


@contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """Inside the block nothing is known of `model`; afterwards what was known before."""
    before = notes(model)
    forget(model)
    try:
        yield
    finally:
        object.__setattr__(model, _ATTRIBUTE, before)


def warn_beyond_window(model: nn.Module, tokens: int) -> None:
    """One warning for a model when a text is longer than a window that its class does not keep."""
    known = notes(model)
    if not known.claims or known.window_named:
        return
    for claim in known.claims:
        if claim.beyond is not None and tokens > claim.beyond:
            note(model, window_named=True)
            warnings.warn(
                f"a text of {tokens} tokens is longer than {claim}; transformers gives other "
                "numbers there",
                VaubanWarning,
                stacklevel=3,
            )
