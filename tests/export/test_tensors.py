"""The bytes of arrays, in pieces."""

import mlx.core as mx
import numpy as np
import pytest

import vauban
from vauban.export import tensor_files as tensors
from vauban.export.tensor_files import array_chunks, array_entry, to_bytes


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.uint8, mx.bool_])
def test_pieces_are_the_bytes_in_order_however_the_array_lies(
    monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype
) -> None:
    monkeypatch.setattr(tensors, "_CHUNK", 64)
    values = mx.random.randint(0, 2, (3, 5, 7)).astype(dtype)
    for array in (values, values.transpose(2, 0, 1), values[:, ::2], values[0, 0, 0], values[:0]):
        cut = list(array_chunks(array))
        as_numbers = np.array(array.astype(mx.float32))
        raw = mx.array(as_numbers).astype(dtype)
        raw = np.array(raw.view(mx.uint16) if dtype == mx.bfloat16 else raw).tobytes()
        assert b"".join(cut) == raw == to_bytes(array)
        assert cut == [raw[i : i + 64] for i in range(0, len(raw), 64)]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_is_found_in_any_piece(
    monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype, bad: float
) -> None:
    monkeypatch.setattr(tensors, "_CHUNK", 64)
    largest = mx.finfo(dtype).max
    values = mx.full((100,), -largest, dtype=dtype)
    assert b"".join(array_entry("w", values).chunks()) == to_bytes(values)
    values[90] = bad
    with pytest.raises(vauban.InputError, match="w holds NaN or inf"):
        list(array_entry("w", values).chunks())
