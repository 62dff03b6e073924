"""What chosen modules read while the model runs its own forward. Knows modules and arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vauban.errors import InputError
from vauban.models.swap import around, swapped
from vauban.models.verify import verify_forward

Reader = Callable[[str, mx.array, mx.array | None], None]


@contextmanager
def module_inputs(model: nn.Module, paths: Iterable[str], read: Reader) -> Iterator[None]:
    """Inside the block every call of a module at `paths` first tells `read(path, x, experts)`.

    x (n, in) are its input rows; experts (n,) the expert of each row for stacked experts, else
    None. Raises InputError for a path the model does not have.
    """
    modules = dict(model.named_modules())
    wanted = list(paths)
    unknown = [path for path in wanted if path not in modules]
    if unknown:
        raise InputError(f"the model has no module {unknown[0]}")
    # A model's first forward pass is checked by others, which are not to be read.
    verify_forward(model)
    swaps = []
    for path in wanted:

        def call(inner: Any, x: mx.array, *args: Any, _path: str = path, **kwargs: Any) -> Any:
            indices = args[0] if args else kwargs.get("indices")
            rows = x.reshape(-1, x.shape[-1])
            experts = None
            if indices is not None:
                experts = indices.reshape(-1)
                # One row may go to several experts: it is repeated for each of them.
                rows = mx.repeat(rows, experts.size // rows.shape[0], axis=0)
            read(_path, rows, experts)
            return inner(x, *args, **kwargs)

        swaps.append(around(modules[path], call))
    with swapped(swaps):
        yield
