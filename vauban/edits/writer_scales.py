"""How strongly each residual writer writes each coordinate of the stream, from weights alone.

A coordinate's scale in one writer is its row's norm (of a table: its column's) times the gain of
the norm behind it. A scale far above the median predicts a coordinate that is loud in the stream.
Reads matrices block by block; runs nothing.

Largest ratio over a model's writers, measured: Gemma 3 270M 222 (post-norm gains up to 172 times
their median); Qwen2.5-Coder-0.5B-Instruct 7.9, SmolLM2-135M-Instruct 6.2, the bundled organisms
3.8. The first has loud coordinates, the others do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban.edits.blocks import matrices, row_blocks
from vauban.errors import InputError
from vauban.models import Writer, residual_writers

LOUD_WRITER = 20.0
"""A writer whose strongest coordinate exceeds this times the median predicts a loud one."""


@dataclass(frozen=True)
class WriterScale:
    """One writer's strongest coordinate, and how far it lies above the median coordinate.

    `ratio` is of row norms times gains; `row_ratio` and `gain_ratio` are the same coordinate's
    of each alone (`gain_ratio` 1.0 where no norm follows the writer).
    """

    path: str
    layer: int
    coordinate: int
    ratio: float
    row_ratio: float
    gain_ratio: float

    @property
    def loud(self) -> bool:
        return self.ratio > LOUD_WRITER

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def writer_scales(
    model: nn.Module, writers: Sequence[Writer] | None = None
) -> tuple[list[WriterScale], list[str]]:
    """Each writer's strongest coordinate, and the paths of writers packed in a form not read.

    >>> import vauban
    >>> model, _ = vauban.load(vauban.organism_path("dense"))
    >>> scales, unread = writer_scales(model)
    >>> any(scale.loud for scale in scales), unread
    (False, [])
    """
    modules = dict(model.named_modules())
    scales, unread = [], []
    for writer in residual_writers(model) if writers is None else writers:
        try:
            norms = _norms(modules[writer.path], table=_is_table(writer))
        except InputError:
            unread.append(writer.path)
            continue
        gain = np.ones_like(norms) if writer.gain is None else np.abs(np.array(writer.gain))
        both = _over_median(norms * gain)
        top = int(both.argmax())
        scales.append(
            WriterScale(
                writer.path, writer.layer, top, float(both[top]),
                float(_over_median(norms)[top]), float(_over_median(gain)[top]),
            )
        )  # fmt: skip
    return scales, unread


def _is_table(writer: Writer) -> bool:
    """Embeddings and position tables write their rows; a matrix writes its outputs."""
    return writer.layer < 0 and writer.kind in ("embedding", "other")


def _norms(module: nn.Module, *, table: bool) -> np.ndarray:
    """(d,) norms of rows, of a table's columns; over all experts where there are several."""
    squares: mx.array | None = None
    for stored in matrices(module):
        parts = [(stored.rows(rows) ** 2).sum(axis=0 if table else 1) for rows in row_blocks(
            stored.shape
        )]  # fmt: skip
        one = mx.stack(parts).sum(axis=0) if table else mx.concatenate(parts)
        squares = one if squares is None else squares + one
        mx.eval(squares)
    assert squares is not None
    return np.sqrt(np.array(squares, dtype=np.float64))


def _over_median(values: np.ndarray) -> np.ndarray:
    """Values over their median; where that is zero, over their mean, and 1 where all are zero."""
    middle = float(np.median(values)) or float(values.mean())
    return values / middle if middle > 0 else np.ones_like(values)
