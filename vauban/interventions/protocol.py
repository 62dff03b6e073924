"""What an intervention is: a value that says what happens where in the residual stream.

Knows sites, layers and arrays; does not know models, caches or tokens. `vauban.models` asks each
value what it does at (site, layer) and applies the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, ClassVar, Protocol, get_type_hints, runtime_checkable

import mlx.core as mx

from vauban.errors import InputError

SITES = ("block_input", "attention_output", "mlp_output")
"""Where the stream can be changed. "block_input" is the residual stream as a block reads it;
"attention_output" and "mlp_output" are the two terms as a block adds them to the stream, after
post-norm and multiplier.

>>> SITES
('block_input', 'attention_output', 'mlp_output')
"""

Change = Callable[[mx.array], mx.array]
"""A function of the stream, or of one of its terms: (..., T, d) in, same shape and dtype out."""


def composed(changes: Sequence[Change | None]) -> Change | None:
    """One function that applies the given ones in order; None when there is nothing to do."""
    steps = [change for change in changes if change is not None]
    if not steps:
        return None

    def run(h: mx.array) -> mx.array:
        for step in steps:
            h = step(h)
        return h

    return run


@runtime_checkable
class Intervention(Protocol):
    """A run-time change of the residual stream: any object with this one method.

    `forward`, `generate`, `collect_activations` and `evaluate` take a list of them and apply them
    in order, in prefill and in cached decoding. Two optional members say more: `width`, the number
    of components that its vectors have, is compared with the model's before anything runs; and
    `start(lengths)` makes it a `PromptIntervention`.

    >>> import mlx.core as mx, vauban
    >>> class Halve:
    ...     def change(self, site, layer, n_layers, prefill):
    ...         if site == "block_input" and layer == 2:
    ...             return lambda h: 0.5 * h
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> tokens = mx.array([vauban.encode_chat(tokenizer, "Hello")])
    >>> plain, halved = (
    ...     vauban.forward(model, tokens, interventions=i).residual[0, 2] for i in ([], [Halve()])
    ... )
    >>> bool(mx.allclose(halved, 0.5 * plain))
    True
    """

    def change(self, site: str, layer: int, n_layers: int, prefill: bool) -> Change | None:
        """The function for the term at `site` of block `layer`, None where nothing happens.

        `layer == n_layers` with site "block_input" is the output of the last block. `prefill` is
        False while new tokens are decoded. A function must act on each token alone, because a
        prompt's common start is read apart from the rest and shorter rows are padded on the right;
        one that looks at a whole prompt needs `start`.
        """
        ...


@runtime_checkable
class PromptIntervention(Intervention, Protocol):
    """An intervention that depends on whole prompts: on positions, or on what a prompt says.

    Prompts under it are read in one piece, without sharing the pass over a common prefix.
    """

    def start(self, lengths: Sequence[int]) -> Intervention:
        """The intervention for one batch; `lengths` (B,) counts each row's real tokens.

        Row i of the stream holds prompt i at its first lengths[i] tokens, then padding. A result
        with `filter(rows)` is told which rows stay, by index, when others have finished.
        """
        ...


def as_interventions(given: Iterable[Intervention]) -> tuple[Intervention, ...]:
    """The interventions of a run; InputError for a single one, and for what is none."""
    if isinstance(given, Intervention):
        raise InputError(f"interventions is one {type(given).__name__}; expected a list of them")
    listed = tuple(given)
    for value in listed:
        if not isinstance(value, Intervention):
            raise InputError(
                f"{value!r:.60} is no intervention; it has no method "
                "change(site, layer, n_layers, prefill)"
            )
    return listed


def started(interventions: Iterable[Intervention], lengths: Sequence[int]) -> list[Intervention]:
    """The interventions for one batch of right-padded prompts with these lengths."""
    return [i.start(lengths) if isinstance(i, PromptIntervention) else i for i in interventions]


def shares_prefix(interventions: Iterable[Intervention]) -> bool:
    """Whether a prompt's start may be read before its end is known."""
    return not any(isinstance(i, PromptIntervention) for i in interventions)


def check_width(interventions: Iterable[Intervention], width: int) -> None:
    """InputError for an intervention whose vectors are not as wide as the stream."""
    for intervention in interventions:
        given = getattr(intervention, "width", None)
        if given is not None and given != width:
            name = type(intervention).__name__.removeprefix("_").removesuffix("Run")
            raise InputError(
                f"{name}: direction has {given} components; the residual stream has {width}"
            )


Reader = Callable[[Any, str], Any]
"""Turns an argument into what the value holds; the text opens the error message."""


class Checked:
    """Base of the frozen values: bad input is refused where it is given, not amid a pass.

    A field that is annotated as `Annotated[type, reader]` holds what its reader made of the
    argument.
    """

    _readers: ClassVar[list[tuple[str, Reader]]]

    def __init_subclass__(cls) -> None:
        hints = get_type_hints(cls, include_extras=True).items()
        cls._readers = [(n, h.__metadata__[0]) for n, h in hints if hasattr(h, "__metadata__")]

    def __post_init__(self) -> None:
        for name, reader in self._readers:
            object.__setattr__(self, name, reader(getattr(self, name), type(self).__name__))

    @property
    def width(self) -> int:
        """Components of the vectors that the value holds."""
        arrays = (value for value in vars(self).values() if isinstance(value, mx.array))
        return int(next(arrays).shape[-1])


def indices(value: Any, name: str, expected: str) -> tuple[int, ...]:
    """One integer or several, of Python, NumPy or mlx; an InputError opens with `name`."""
    try:
        return (index(value),)
    except (TypeError, ValueError):
        pass
    try:
        return tuple(map(index, value))
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is {value!r}; expected {expected}") from error


def number(name: str) -> Reader:
    """Reads the argument `name` as a finite float."""

    def reader(value: Any, owner: str) -> float:
        try:
            result = float(value)
        except (TypeError, ValueError) as error:
            raise InputError(f"{owner}: {name} is {value!r}; expected a number") from error
        if not abs(result) < float("inf"):
            raise InputError(f"{owner}: {name} is {result}; expected a finite number")
        return result

    return reader


@dataclass(frozen=True)
class Scope:
    """The blocks, or the residuals, that an intervention touches; `chosen` None is all of them."""

    chosen: frozenset[int] | None
    owner: str
    unit: str

    @property
    def first(self) -> int:
        return min(self.chosen) if self.chosen else 0

    def covers(self, layer: int, n_layers: int) -> bool:
        """Whether `layer` is touched; InputError where the scope lies beyond the model."""
        last = n_layers if self.unit == "residual" else n_layers - 1
        if self.chosen is None:
            return layer <= last
        if max(self.chosen) > last:
            raise InputError(
                f"{self.owner}: {self.unit} {max(self.chosen)} does not exist; "
                f"the model has {self.unit}s 0 to {last}"
            )
        return layer in self.chosen


def _scope(layers: Any, owner: str, unit: str) -> Scope:
    if isinstance(layers, Scope):
        return layers
    if isinstance(layers, str) and layers == "all":
        return Scope(None, owner, unit)
    chosen = frozenset(indices(layers, f"{owner}: layers", "'all', an int or a list of ints"))
    if not chosen:
        raise InputError(f"{owner}: layers is empty; name at least one {unit} or 'all'")
    if min(chosen) < 0:
        raise InputError(f"{owner}: layer {min(chosen)} is negative; {unit}s count from 0")
    return Scope(chosen, owner, unit)


def blocks(layers: Any, owner: str) -> Scope:
    """Reads "all", one block or several; one that is repeated counts once."""
    return _scope(layers, owner, "block")


def residuals(layers: Any, owner: str) -> Scope:
    """Reads "all", one residual or several: r is the input of block r, n_layers the last output."""
    return _scope(layers, owner, "residual")


def residual(layer: Any, owner: str) -> int:
    """Reads one residual index."""
    chosen = residuals(layer, owner).chosen
    if chosen is None or len(chosen) > 1:
        raise InputError(f"{owner}: layer is {layer!r}; expected one residual index")
    return min(chosen)
