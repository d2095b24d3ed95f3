import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config import DataConfig
from megatron_ext.data import index_checks
from megatron_ext.data.checks import check_data
from megatron_ext.data.documents import DocumentReader
from megatron_ext.data.index_checks import check_index
from megatron_ext.data.indexed import HEADER, read_index
from megatron_ext.errors import ConfigError
from tests.megatron_ext.data.builders import write_dataset

LENGTHS = [3, 1, 0, 4, 2]
LENGTH_AT = HEADER.size
PLACE_AT = LENGTH_AT + 4 * len(LENGTHS)
BOUNDARY_AT = PLACE_AT + 8 * len(LENGTHS)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    tokens = iter(range(1, 100))
    return write_dataset(tmp_path / "d", [[next(tokens) for _ in range(n)] for n in LENGTHS], manifest=False)


def change(prefix: str, at: int, data: bytes) -> None:
    path = Path(f"{prefix}.idx")
    content = path.read_bytes()
    path.write_bytes(content[:at] + data + content[at + len(data) :])


@pytest.mark.parametrize("chunk", [2, 100])
def test_a_whole_index(prefix: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_checks, "CHUNK", chunk)
    assert check_index(prefix) == read_index(prefix)
    change(
        prefix, BOUNDARY_AT, np.array([0, 0, 2, 2, 5, 5], "<i8").tobytes()
    )  # of several sequences, or none
    check_index(prefix)


@pytest.mark.parametrize("chunk", [2, 100])
@pytest.mark.parametrize(
    ("at", "kind", "value", "message"),
    [
        (LENGTH_AT + 4, "<i", -1, "the length of sequence 1 is -1"),
        (LENGTH_AT + 4, "<i", 2, "sequence 2 begins at byte 8, but the one before it ends at byte 10"),
        (LENGTH_AT + 4, "<i", 2**31 - 1, r"sequence 2 begins at byte 8, .* byte 4294967300"),
        (PLACE_AT, "<q", 2, "sequence 0 begins at byte 2, but the one before it ends at byte 0"),
        (PLACE_AT + 8, "<q", 2, "sequence 1 begins at byte 2, but the one before it ends at byte 6"),
        (PLACE_AT + 16, "<q", -8, "sequence 2 begins at byte -8, but"),
        (PLACE_AT + 24, "<q", 2**62, "sequence 3 begins at byte 4611686018427387904, but"),
        (BOUNDARY_AT, "<q", 1, "document 0 begins at sequence 1; .* and 0 for the first"),
        (BOUNDARY_AT + 16, "<q", 0, "document 2 begins at sequence 0; it must be from 1 to 5"),
        (BOUNDARY_AT + 24, "<q", 6, "document 3 begins at sequence 6; it must be from 2 to 5"),
        (BOUNDARY_AT + 16, "<q", -(2**63), "document 2 begins at sequence -9223372036854775808"),
        (BOUNDARY_AT + 40, "<q", 4, "the last document ends with sequence 4 of 5"),
    ],
)
def test_entries_that_cannot_be(
    prefix: str, at: int, kind: str, value: int, message: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_checks, "CHUNK", chunk)
    change(prefix, at, struct.pack(kind, value))
    with pytest.raises(ConfigError, match=rf"d\.idx: {message}.*\. The index is damaged: copy it again"):
        check_index(prefix)
    assert any("d.idx: " in problem for problem in check_data(DataConfig(data_path=(prefix,)), 1000))


@settings(max_examples=150)
@given(st.integers(0, BOUNDARY_AT + 8 * len(LENGTHS) + 7), st.integers(0, 255))
def test_any_byte(tmp_path_factory: pytest.TempPathFactory, at: int, value: int) -> None:
    """An index with one other byte is refused by name, and so is what a reader takes from it unchecked."""
    folder = tmp_path_factory.mktemp("index")
    tokens = iter(range(1, 100))
    documents = [[next(tokens) for _ in range(n)] for n in LENGTHS]
    prefix = write_dataset(folder / "d", documents, manifest=False)
    before = Path(f"{prefix}.idx").read_bytes()
    reader = DocumentReader(prefix)
    reader.read(0, 0, None)  # it knows the header from before
    change(prefix, at, bytes([value]))
    if before == Path(f"{prefix}.idx").read_bytes():
        return
    with pytest.raises(ConfigError, match=r"d\.(idx|bin): "):
        check_index(prefix)
    refusals = []
    for number, document in enumerate(documents):
        try:
            assert len(reader.read(number, 0, len(document))) == len(document)
        except ConfigError as error:
            refusals.append(str(error))
    assert all(".idx: document" in refusal or ".bin: ends after" in refusal for refusal in refusals)


@pytest.mark.parametrize(
    ("sequences", "boundaries"), [(2**63, 6), (5, 2**63), (2**64 - 1, 2**64 - 1), (6, 4), (0, 0)]
)
def test_counts_that_cannot_be(prefix: str, sequences: int, boundaries: int) -> None:
    change(prefix, HEADER.size - 16, struct.pack("<QQ", sequences, boundaries))
    with pytest.raises(ConfigError, match=r"d\.idx: "):
        check_index(prefix)


@pytest.mark.parametrize("code", [0, 6, 7, 9, 255])
def test_types_that_no_tokens_have(prefix: str, code: int) -> None:
    change(prefix, 17, bytes([code]))
    with pytest.raises(ConfigError, match=rf"d\.idx: unknown version 1 or dtype code {code}"):
        check_index(prefix)


def test_a_type_of_another_size(prefix: str) -> None:
    change(prefix, 17, bytes([4]))  # int32 where the tokens are uint16
    with pytest.raises(ConfigError, match=r"d\.bin: 20 bytes, but d\.idx calls for 24"):
        check_index(prefix)


def test_documents_at_random(prefix: str) -> None:
    reader = DocumentReader(prefix)
    assert reader.read(0, 0, None).tolist() == [1, 2, 3]
    assert reader.read(3, 1, 2).tolist() == [6, 7]
    assert reader.read(2, 0, None).tolist() == []
    for document, offset, length in ((5, 0, 1), (-1, 0, 1), (0, 4, None), (0, -1, 2), (0, 2, 2), (0, 0, -1)):
        with pytest.raises(ConfigError, match=r"d\.idx: .*it is not the index that it was"):
            reader.read(document, offset, length)
