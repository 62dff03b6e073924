"""Result objects as JSON values. Knows dataclasses; knows nothing of what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def to_plain(value: Any) -> Any:
    """A frozen result as dictionaries, lists and numbers; fields left out of its repr are left out.

    >>> from vauban.evaluation import Likelihood
    >>> to_plain(Likelihood(1.5, 2.5, 0.1, 8, kl_interval=(0.0, 0.2)))["kl_interval"]
    [0.0, 0.2]
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value) if f.repr}
    if isinstance(value, Mapping):
        return {key: to_plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(inner) for inner in value]
    return value
