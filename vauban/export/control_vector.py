"""A direction as a GGUF control vector, which llama.cpp and what is built on it add to the stream.

Needs the `gguf` package (`pip install 'vauban[gguf]'`). Knows directions and files; loads no model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vauban._arrays import as_numpy, floats
from vauban._extras import need
from vauban.directions import DirectionResult
from vauban.errors import InputError

# llama.cpp's names for families that it calls otherwise than transformers does.
_HINTS = {"mistral": "llama", "gemma3_text": "gemma3", "phi": "phi2", "cohere": "command-r"}


def export_control_vector(
    result: Any,
    path: str | Path,
    *,
    layers: Iterable[int] | None = None,
    scale: float = 1.0,
    model_type: str = "llama",
) -> Path:
    """Write a direction as a control vector: `--control-vector FILE` of llama.cpp's programs.

    A file holds float32 tensors `direction.N` (d,), and llama.cpp adds `direction.N`, times the
    scale that it is given, to the output of block N, counted from 0: that is residual N + 1. Block
    0 has none there, so N runs from 1 to L - 1 (`tools/cvector-generator`, `llama-adapter.cpp`).

    A vector is the raw difference of the class means at its block. With `--control-vector-scaled
    FILE:K --control-vector-layer-range N N` a model does what `Add.from_result(result, K)` does
    here at the chosen block N; without a range the differences of all blocks add up, so that a
    tenth or less is enough. A negative K takes the direction away.

    Args:
        result: a `DirectionResult`; an array (L, d) of one vector for each block's output, block
            0's unused; or one vector (d,), which `layers` needs then.
        path: the file, ending in .gguf.
        layers: the blocks that get a vector; None is 1 to L - 1.
        scale: a factor on every vector.
        model_type: what config.json calls the family. llama.cpp shows it and does not read it.

    Raises InputError for another suffix, block 0, a block that does not exist, vectors that are
    zero or not finite, and where `gguf` is not installed.

    >>> import tempfile, numpy as np, vauban
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     vauban.export_control_vector(np.ones(8), f"{folder}/all.gguf", layers=range(1, 4)).name
    'all.gguf'
    """
    path = Path(path).expanduser()
    check_control_vector(path)
    vectors = _vectors(result, layers)
    for block, vector in vectors.items():
        if not np.isfinite(vector).all() or not np.abs(vector).max() > 0:
            raise InputError(
                f"the vector of block {block} is zero, NaN or inf; nothing was written"
            )
    gguf = need("gguf", "gguf", "a GGUF control vector")
    draft = path.with_name(f".{path.name}.draft")
    writer = gguf.GGUFWriter(draft, "controlvector")
    writer.add_string("controlvector.model_hint", _HINTS.get(model_type, model_type))
    writer.add_int32("controlvector.layer_count", len(vectors))
    for block, vector in sorted(vectors.items()):
        writer.add_tensor(f"direction.{block}", np.ascontiguousarray(scale * vector, np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def check_control_vector(path: str | Path) -> None:
    """InputError where no control vector can be written to `path`, known before one is measured."""
    path = Path(path).expanduser()
    if path.suffix != ".gguf":
        raise InputError(f"{path}: a control vector is saved as FILE.gguf")
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist")
    need("gguf", "gguf", "a GGUF control vector")


def _vectors(result: Any, layers: Iterable[int] | None) -> Mapping[int, np.ndarray]:
    """{block: vector}."""
    if isinstance(result, DirectionResult):
        norms = np.array(floats(result.norms), np.float32)
        table = norms[:, None] * as_numpy(result.directions)
    else:
        try:
            table = np.array(result, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"a {type(result).__name__} is no direction; expected a DirectionResult or an array"
            ) from error
    wanted = None if layers is None else [int(layer) for layer in layers]
    if table.ndim == 1:
        if not wanted:
            raise InputError(
                "one vector alone needs layers=, the blocks whose output it is added to"
            )
        table = np.broadcast_to(table, (max(wanted) + 1, len(table)))
    if table.ndim != 2 or table.shape[0] < 2:
        raise InputError(f"an array of shape {table.shape}; expected (d,) or (L, d) with L above 1")
    blocks = range(1, len(table)) if wanted is None else wanted
    for block in blocks:
        if not 0 < block < len(table):
            raise InputError(
                f"block {block} gets no control vector: llama.cpp reads those of blocks 1 to "
                f"{len(table) - 1}"
            )
    return {block: table[block] for block in blocks}
