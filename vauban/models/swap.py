"""Other methods for some modules for the time of a `with` block: the one way to look into a model.

A module's class is exchanged for a subclass and put back afterwards, so there are no hooks,
attributes and `isinstance` keep working, and the model's own forward pass runs unchanged. Knows
modules; knows nothing of streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.nn as nn

from vauban.errors import ArchitectureError

Swap = tuple[nn.Module, Mapping[str, Any]]
"""A module (it cannot be a dictionary's key), and the methods or properties it gets by name."""


@contextmanager
def swapped(swaps: Iterable[Swap]) -> Iterator[None]:
    """Inside the block the modules have other methods; on leaving, also by an error, their own.

    Blocks may be nested: the inner one works on what the outer one made. Raises ArchitectureError
    for a module that is named twice: one of the two changes would be lost.
    """
    classes: list[tuple[nn.Module, type]] = []
    try:
        for module, methods in swaps:
            if any(module is seen for seen, _ in classes):
                raise ArchitectureError(
                    f"{type(module).__name__} is used at two places of the stream; "
                    "this intervention cannot be applied exactly"
                )
            cls = type(module)
            classes.append((module, cls))
            module.__class__ = type(f"Swapped{cls.__name__}", (cls,), dict(methods))
        yield
    finally:
        for module, cls in classes:
            module.__class__ = cls


def around(module: nn.Module, wrapper: Callable[..., Any], method: str = "__call__") -> Swap:
    """The swap that runs `wrapper(call, *args, **kwargs)`; `call` is the module's own method."""
    original = getattr(type(module), method)

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return wrapper(partial(original, self), *args, **kwargs)

    return module, {method: run}
