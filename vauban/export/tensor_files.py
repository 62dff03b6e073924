"""safetensors as a stream: headers, raw bytes, one tensor at a time. Knows files, no models.

Format: 8 bytes little-endian header length, a JSON header {name: dtype, shape, data_offsets},
then the data.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from vauban.errors import InputError
from vauban.models import check_safetensors, weight_files

_DTYPES = {
    mx.bool_: "BOOL", mx.uint8: "U8", mx.int8: "I8", mx.uint16: "U16", mx.int16: "I16",
    mx.uint32: "U32", mx.int32: "I32", mx.uint64: "U64", mx.int64: "I64",
    mx.float16: "F16", mx.bfloat16: "BF16", mx.float32: "F32",
}  # fmt: skip
# The exponent's bits: all set in NaN and inf.
_EXPONENTS = {mx.float16: 0x7C00, mx.bfloat16: 0x7F80, mx.float32: 0x7F800000}
_CHUNK = 1 << 24


@dataclass(frozen=True)
class TensorOnDisk:
    """Where a tensor lies: byte range [start, end) of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, in pieces of at most 16 MB."""
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            rest = self.end - self.start
            while rest:
                piece = stream.read(min(rest, _CHUNK))
                if not piece:
                    raise InputError(f"{self.file} ended {rest} bytes early")
                rest -= len(piece)
                yield piece


@dataclass(frozen=True, eq=False)
class Entry:
    """A tensor to write: its header facts, and a function that yields its bytes when asked."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes]]

    @property
    def nbytes(self) -> int:
        return element_size(self.dtype) * int(np.prod(self.shape, dtype=np.int64))

    def expected(self) -> list[Fact]:
        """What it will add to the header."""
        return [(self.name, self.dtype, self.shape)]


@dataclass(frozen=True, eq=False)
class LateTensors:
    """The tensors of one module, computed together when they are written, and then dropped."""

    path: str
    entries: Callable[[], Iterator[Entry]]
    expected_arrays: tuple[tuple[str, str, tuple[int, ...]], ...]

    def expected(self) -> list[Fact]:
        """What it will most likely add to the header: (part, dtype, shape)."""
        return [
            (f"{self.path}.{part}", dtype, shape) for part, dtype, shape in self.expected_arrays
        ]


def element_size(dtype: str) -> int:
    """The bytes of one element of a safetensors type."""
    return 1 if dtype == "BOOL" or dtype.startswith("F8") else int(dtype.lstrip("BFIU")) // 8


def stored_tensors(folder: Path) -> dict[str, TensorOnDisk]:
    """Every tensor of a checkpoint folder's `weight_files`, by name."""
    tensors: dict[str, TensorOnDisk] = {}
    for file in weight_files(folder).files:
        header = check_safetensors(file)
        with file.open("rb") as stream:
            base = 8 + struct.unpack("<Q", stream.read(8))[0]
        for name, facts in header.items():
            if name == "__metadata__":
                continue
            start, end = facts["data_offsets"]
            tensors[name] = TensorOnDisk(
                file, facts["dtype"], tuple(facts["shape"]), base + start, base + end
            )
    return tensors


def copied_entry(name: str, stored: TensorOnDisk) -> Entry:
    """An entry whose bytes are those of a stored tensor."""
    return Entry(name, stored.dtype, stored.shape, stored.chunks)


def computed_entry(
    name: str, shape: tuple[int, ...], dtype: mx.Dtype, make: Callable[[], mx.array]
) -> Entry:
    """An entry that is computed when it is written, and dropped afterwards."""

    def chunks() -> Iterator[bytes]:
        value = make()
        if tuple(value.shape) != shape or value.dtype != dtype:
            raise InputError(f"{name} became {value.dtype} {value.shape}; expected {dtype} {shape}")
        return _finite(name, value)

    return Entry(name, stored_dtype(dtype), shape, chunks)


def stacked_entry(name: str, values: Sequence[mx.array]) -> Entry:
    """An entry that holds the parts of its array along a new first axis."""
    shape, dtype = tuple(values[0].shape), stored_dtype(values[0].dtype)

    def chunks() -> Iterator[bytes]:
        return (piece for value in values for piece in _finite(name, value))

    return Entry(name, dtype, (len(values), *shape), chunks)


def array_entry(name: str, value: mx.array) -> Entry:
    """An entry that holds its array."""
    return computed_entry(name, tuple(value.shape), value.dtype, lambda: value)


def stored_dtype(dtype: mx.Dtype) -> str:
    """The name safetensors has for an mlx dtype."""
    if dtype not in _DTYPES:
        raise InputError(f"safetensors cannot hold {dtype}")
    return _DTYPES[dtype]


def mlx_dtype(name: str) -> mx.Dtype:
    """The mlx dtype of a name in a safetensors header; bytes for those that mlx lacks."""
    return next((dtype for dtype, known in _DTYPES.items() if known == name), mx.uint8)


def _finite(name: str, value: mx.array) -> Iterator[bytes]:
    """Its bytes; InputError on the way where it holds NaN or inf."""
    exponent = _EXPONENTS.get(value.dtype)
    for piece in _pieces(value):
        if exponent is not None:
            bits = piece.view(f"u{piece.itemsize}")
            if bool(((bits & exponent) == exponent).any()):
                raise InputError(f"{name} holds NaN or inf; nothing was written")
        yield piece.tobytes()


def rechunked(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes, cut where `TensorOnDisk.chunks` cuts."""
    buffer = bytearray()
    for chunk in chunks:
        buffer += chunk
        while len(buffer) >= _CHUNK:
            yield bytes(buffer[:_CHUNK])
            del buffer[:_CHUNK]
    if buffer:
        yield bytes(buffer)


def array_chunks(value: mx.array) -> Iterator[bytes]:
    """Little-endian bytes of an array, cut as `TensorOnDisk.chunks`; no copy of the whole."""
    return (piece.tobytes() for piece in _pieces(value))


def to_bytes(value: mx.array) -> bytes:
    """Little-endian bytes of an array."""
    return b"".join(array_chunks(value))


def _pieces(value: mx.array) -> Iterator[np.ndarray]:
    """Its elements in order; NumPy has no bfloat16, so it passes as uint16."""
    array = np.asarray(value.view(mx.uint16) if value.dtype == mx.bfloat16 else value)
    step = _CHUNK // array.itemsize
    # Of a transposed array `reshape` would copy the whole.
    flat = array.reshape(-1) if array.flags.c_contiguous else array.flat
    for start in range(0, array.size, step):
        yield flat[start : start + step]


def write_safetensors(
    path: Path, items: Sequence[Entry | LateTensors], metadata: dict[str, str]
) -> None:
    """Write tensors one after the other; the header is filled in at the end.

    Shapes and formats of `LateTensors` are known only when these have been computed. Room is kept
    for the expected header; should the real one outgrow it, the data are moved once.
    """
    expected = [f for item in items for f in item.expected()]
    room = len(_header(expected, metadata))
    # Readers map the data; keep it aligned to 8 bytes as the reference writer does.
    room += -room % 8
    facts: list[Fact] = []
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", room) + b" " * room)
        for item in items:
            for entry in item.entries() if isinstance(item, LateTensors) else (item,):
                written = 0
                for piece in entry.chunks():
                    stream.write(piece)
                    written += len(piece)
                if written != entry.nbytes:
                    raise InputError(
                        f"{entry.name} came to {written} bytes; expected {entry.nbytes}"
                    )
                facts.append((entry.name, entry.dtype, entry.shape))
    text = _header(facts, metadata)
    if len(text) > room:
        _make_room(path, room, len(text) + -len(text) % 8)
        room = len(text) + -len(text) % 8
    with path.open("r+b") as stream:
        stream.write(struct.pack("<Q", room) + text + b" " * (room - len(text)))
        stream.flush()
        os.fsync(stream.fileno())


def _make_room(path: Path, old: int, new: int) -> None:
    """Move the data behind a header of `old` bytes so that one of `new` bytes fits."""
    moved = path.with_name(path.name + ".moved")
    with path.open("rb") as source, moved.open("wb") as target:
        source.seek(8 + old)
        target.write(b" " * (8 + new))
        shutil.copyfileobj(source, target, _CHUNK)
    moved.replace(path)


Fact = tuple[str, str, tuple[int, ...]]


def _header(facts: Sequence[Fact], metadata: dict[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, dtype, shape in facts:
        end = offset + element_size(dtype) * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    return json.dumps(header, separators=(",", ":")).encode()


def sha256(file: Path) -> str:
    """The SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
