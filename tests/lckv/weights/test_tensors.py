"""Tensors that are read one at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lckv.errors import ModelError
from lckv.weights.tensors import WEIGHT_DTYPES, MemorySource, TensorInfo, dtype_name, dtype_of, row_chunks


@given(rows=st.integers(1, 40), width=st.integers(1, 9), chunk=st.integers(1, 300))
def test_row_chunks_cover_all_rows_once(rows: int, width: int, chunk: int) -> None:
    info = TensorInfo((rows, width), torch.bfloat16)
    slices = list(row_chunks(info, chunk))
    assert [row for part in slices for row in range(part.start, part.stop)] == list(range(rows))
    assert all((part.stop - part.start) * width * 2 <= max(chunk, width * 2) for part in slices)


def test_memory_source() -> None:
    source = MemorySource({"w": torch.arange(6.0).reshape(3, 2)})
    assert source.infos() == {"w": TensorInfo((3, 2), torch.float32)}
    assert source.infos()["w"].nbytes == 24
    assert torch.equal(source.read("w", slice(1, 3)), source.read("w")[1:])


def test_dtypes_and_their_names() -> None:
    assert [dtype_of(dtype_name(dtype), "x") for dtype in WEIGHT_DTYPES] == list(WEIGHT_DTYPES)
    assert dtype_of(torch.float16, "x") == torch.float16
    with pytest.raises(
        ModelError, match="dtype is 'int8'; weights of float32, bfloat16, float16 can be read"
    ):
        dtype_of("int8", "dtype")
