"""Writing and checking megatron's indexed datasets in bounded memory.

PREFIX.bin holds the tokens of all documents, one after the other. PREFIX.idx tells where each begins,
little-endian:

    9 bytes  magic            int32 [n]    length of each sequence, in tokens
    uint64   version, 1       int64 [n]    where each begins in PREFIX.bin, in bytes
    uint8    code of dtype    int64 [d+1]  at which sequence each document begins, and the end
    uint64   n
    uint64   d + 1

Here every document is one sequence. megatron's own builder keeps all lengths in Python lists (tens of bytes
for each); this one keeps them in a temporary file. `megatron.core.datasets.indexed_dataset.IndexedDataset`
reads what is written here. The inside of an index is checked by `index_checks`.
"""

import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from megatron_ext.data.outputs import MAGIC, OutputFiles
from megatron_ext.errors import ConfigError
from megatron_ext.signals import deferred

HEADER = struct.Struct("<9sQBQQ")
_DTYPE_CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
REMEDY = "lckv-megatron preprocess"
"""What makes datasets, for messages."""
CHUNK = 1 << 16
"""Entries of an index that are in memory at a time."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that megatron chooses for the tokens of a vocabulary: uint16 if they fit, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def outside_vocabulary(prefix: str, token: int, vocab_size: int) -> str:
    """That a dataset has a token which the model does not."""
    if token < 0:
        return (
            f"{prefix}.bin holds the token {token}; negative ones are those of conversations that are not "
            "learned. If it is a dataset of them, set data.format to chat and put its description beside it."
        )
    return (
        f"{prefix}.bin holds the token {token}, but the vocabulary has {vocab_size}. Set model.vocab_size to "
        "that of the tokenizer that made the dataset."
    )


@dataclass(frozen=True)
class IndexInfo:
    """Header of an index: type of a token, number of sequences and of documents,
    size of PREFIX.bin in tokens."""

    dtype: np.dtype
    sequences: int
    documents: int
    tokens: int


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx, in a folder of its own until `close`.

    As a context manager it removes that folder if an exception passes. Raises ConfigError if there is
    something else in its place.
    """

    def __init__(self, prefix: str, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.documents = 0
        self.tokens = 0
        self._output = OutputFiles(prefix)
        folder = self._output.begin()
        self._bin = (folder / "bin").open("wb")
        self._lengths = (folder / "lengths").open("wb+")

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: `tokens` [sum of lengths] of all of them, `lengths` int32 [documents]."""
        assert len(tokens) == lengths.sum()
        assert tokens.dtype == self.dtype
        self._bin.write(tokens.data)
        self._lengths.write(lengths.astype("<i4", copy=False).data)
        self.documents += len(lengths)
        self.tokens += len(tokens)

    def add_dataset(self, prefix: str) -> None:
        """Append a whole indexed dataset of the same dtype; each of its sequences becomes a document."""
        info = read_index(prefix)
        if info.dtype != self.dtype:
            raise ConfigError(
                f"{prefix}.bin holds {info.dtype}, the others {self.dtype}; they cannot be merged."
            )
        with Path(f"{prefix}.bin").open("rb") as source:
            shutil.copyfileobj(source, self._bin, 1 << 20)
        for lengths in index_lengths(prefix):
            self._lengths.write(lengths.data)
        self.documents += info.sequences
        self.tokens += info.tokens

    def close(self, description: bytes = b"") -> None:
        """Write the index and give both files their names, and with them `description`, if there is one,
        that of PREFIX.dataset.json."""
        _sync_and_close(self._bin)
        with (self._output.folder / "idx").open("wb") as index:
            self._write_index(index)
            index.flush()
            os.fsync(index.fileno())
        self._lengths.close()
        with deferred():  # files are moved one after the other
            self._output.finish(description)

    def _write_index(self, index: BinaryIO) -> None:
        code = next(code for code, name in _DTYPE_CODES.items() if self.dtype == np.dtype(name))
        index.write(HEADER.pack(MAGIC, 1, code, self.documents, self.documents + 1))
        self._lengths.seek(0)
        shutil.copyfileobj(self._lengths, index, 4 * CHUNK)
        self._lengths.seek(0)
        start = 0
        while len(chunk := np.frombuffer(self._lengths.read(4 * CHUNK), "<i4")):
            ends = start + np.cumsum(chunk, dtype=np.int64) * self.dtype.itemsize
            index.write(np.concatenate([[start], ends[:-1]]).astype("<i8").data)
            start = int(ends[-1])
        for first in range(0, self.documents + 1, CHUNK):
            index.write(np.arange(first, min(first + CHUNK, self.documents + 1), dtype="<i8").data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bin.close()
        self._lengths.close()
        self._output.abandon()


def _sync_and_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def read_index(prefix: str) -> IndexInfo:
    """Header of PREFIX.idx, checked against the sizes of both files; the rest is left to `check_index`.

    Raises ConfigError if a file is missing, is not of this format, or is not as long as it should be.
    """
    index_path, bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    missing = [str(path) for path in (bin_path, index_path) if not path.is_file()]
    if missing:
        hint = " A prefix has no .bin or .idx at its end." if prefix.endswith((".bin", ".idx")) else ""
        raise ConfigError(
            f"dataset {prefix}: {' and '.join(missing)} not found.{hint} Make it with {REMEDY}."
        )
    with index_path.open("rb") as index:
        header = index.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise ConfigError(f"{index_path}: not an index of a megatron dataset. Make it again with {REMEDY}.")
    _, version, code, sequences, boundaries = HEADER.unpack(header)
    if version != 1 or code not in _DTYPE_CODES or boundaries < 1:
        raise ConfigError(
            f"{index_path}: unknown version {version} or dtype code {code}. Make it again with {REMEDY}."
        )
    needed = HEADER.size + 12 * sequences + 8 * boundaries
    size = index_path.stat().st_size
    if size not in (needed, needed + sequences):  # multimodal datasets have one more byte for each sequence
        raise ConfigError(
            f"{index_path}: {size} bytes, but its header calls for {needed}. Make it again with {REMEDY}."
        )
    dtype = np.dtype(_DTYPE_CODES[code])
    tokens = _tokens_of(index_path, sequences, dtype)
    if bin_path.stat().st_size != tokens * dtype.itemsize:
        raise ConfigError(
            f"{bin_path}: {bin_path.stat().st_size} bytes, but {index_path.name} calls for "
            f"{tokens * dtype.itemsize}; it is "
            f"truncated or belongs to another index. Copy both files again, or make them with {REMEDY}."
        )
    return IndexInfo(dtype, sequences, boundaries - 1, tokens)


def _tokens_of(index_path: Path, sequences: int, dtype: np.dtype) -> int:
    """Size of PREFIX.bin in tokens: where the last sequence begins, plus its length."""
    if not sequences:
        return 0
    with index_path.open("rb") as index:
        index.seek(HEADER.size + 4 * (sequences - 1))
        length = int.from_bytes(index.read(4), "little", signed=True)
        index.seek(HEADER.size + 12 * sequences - 8)
        return int.from_bytes(index.read(8), "little", signed=True) // dtype.itemsize + length


def index_lengths(prefix: str) -> Iterator[np.ndarray]:
    """Lengths of the sequences of a dataset in tokens, int32, chunk by chunk."""
    with Path(f"{prefix}.idx").open("rb") as index:
        sequences = HEADER.unpack(index.read(HEADER.size))[3]
        for first in range(0, sequences, CHUNK):
            data = index.read(4 * min(CHUNK, sequences - first))
            if len(data) < 4 * min(CHUNK, sequences - first):
                raise ConfigError(
                    f"{prefix}.idx: ends within its {sequences} lengths; it was cut short since it was "
                    f"checked. Copy it again, or make it with {REMEDY}."
                )
            yield np.frombuffer(data, "<i4")


def token_chunks(prefix: str, info: IndexInfo, count: int = 1 << 22) -> Iterator[np.ndarray]:
    """All tokens of a dataset in order, `count` at a time."""
    with Path(f"{prefix}.bin").open("rb") as tokens:
        while len(chunk := np.frombuffer(tokens.read(count * info.dtype.itemsize), info.dtype)):
            yield chunk


def merge_datasets(prefixes: Sequence[str], output: str, description: bytes = b"") -> None:
    """Append indexed datasets to one another into `output`, without loading them; `description` as in
    `IndexedWriter.close`."""
    with ExitStack() as stack:
        with deferred():  # what is begun is also abandoned
            writer = stack.enter_context(IndexedWriter(output, read_index(prefixes[0]).dtype))
        for prefix in prefixes:
            writer.add_dataset(prefix)
        writer.close(description)
