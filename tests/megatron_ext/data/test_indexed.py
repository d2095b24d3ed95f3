from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.data import indexed
from megatron_ext.data.indexed import (
    IndexedWriter,
    index_lengths,
    merge_datasets,
    read_index,
    token_chunks,
    token_dtype,
)
from megatron_ext.errors import ConfigError
from tests.megatron_ext.data.builders import write_dataset

documents_of = st.lists(st.lists(st.integers(0, 900), min_size=1, max_size=9), min_size=1, max_size=40)


def stock_builder(prefix: Path, documents: list[list[int]], dtype: np.dtype) -> str:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype.type)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def files_of(prefix: str) -> list[bytes]:
    return [Path(f"{prefix}.{name}").read_bytes() for name in ("bin", "idx")]


@settings(max_examples=20)
@given(documents_of, st.sampled_from([1000, 100_000]))
def test_files_are_those_of_megatrons_builder(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], vocab_size: int
) -> None:
    folder = tmp_path_factory.mktemp("indexed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed, "CHUNK", 7)
        ours = write_dataset(folder / "ours", documents, vocab_size=vocab_size)
        read = [length for lengths in index_lengths(ours) for length in lengths]
    assert files_of(ours) == files_of(stock_builder(folder / "stock", documents, token_dtype(vocab_size)))
    assert read == [len(document) for document in documents]
    info = read_index(ours)
    assert (info.sequences, info.documents, info.tokens) == (
        len(documents),
        len(documents),
        sum(map(len, documents)),
    )
    assert np.concatenate(list(token_chunks(ours, info, 5))).tolist() == [
        token for d in documents for token in d
    ]


def test_megatron_reads_the_files(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = [[5, 6, 7], [1], [900, 2]]
    dataset = IndexedDataset(write_dataset(tmp_path / "d", documents))
    assert [dataset[number].tolist() for number in range(len(dataset))] == documents
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]


def test_merging_is_the_same_as_writing_together(tmp_path: Path) -> None:
    parts = [[[1, 2], [3]], [[4, 5, 6]], [[7], [8, 9]]]
    prefixes = [write_dataset(tmp_path / f"part{number}", part) for number, part in enumerate(parts)]
    merge_datasets(prefixes, str(tmp_path / "merged"))
    whole = write_dataset(tmp_path / "whole", [document for part in parts for document in part])
    assert files_of(str(tmp_path / "merged")) == files_of(whole)


def test_different_types_are_not_merged(tmp_path: Path) -> None:
    prefixes = [write_dataset(tmp_path / str(size), [[1]], vocab_size=size) for size in (1000, 100_000)]
    with pytest.raises(ConfigError, match=r"100000\.bin holds int32, the others uint16"):
        merge_datasets(prefixes, str(tmp_path / "merged"))
    assert not list(tmp_path.glob("merged*"))


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with IndexedWriter(str(tmp_path / "d"), np.dtype(np.uint16)) as writer:
            writer.add(np.array([1, 2], np.uint16), np.array([2], np.int32))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not list(tmp_path.iterdir())


def test_files_that_are_missing_truncated_or_of_another_kind(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", [[1, 2, 3], [4]])
    bin_path, index_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    tokens, index = bin_path.read_bytes(), index_path.read_bytes()

    def fails(message: str, given: str = prefix) -> None:
        with pytest.raises(ConfigError, match=message):
            read_index(given)
        bin_path.write_bytes(tokens)
        index_path.write_bytes(index)

    index_path.unlink()
    fails(r"d\.idx not found\. Make it with lckv-megatron preprocess")
    bin_path.unlink()
    fails(r"d\.bin not found")
    fails(
        r"d\.bin\.bin and .*d\.bin\.idx not found\. A prefix has no \.bin or \.idx at its end",
        f"{prefix}.bin",
    )
    bin_path.write_bytes(tokens[:-2])
    fails(r"d\.bin: 6 bytes, but d\.idx calls for 8; it is truncated")
    index_path.write_bytes(index[:-1])
    fails(r"d\.idx: \d+ bytes, but its header calls for \d+")
    index_path.write_bytes(index[:20])
    fails(r"d\.idx: not an index of a megatron dataset")
    index_path.write_bytes(b"X" + index[1:])
    fails(r"d\.idx: not an index of a megatron dataset")
    index_path.write_bytes(index[:9] + b"\2" + index[10:])
    fails(r"d\.idx: unknown version 2")
    assert read_index(prefix).tokens == 4
