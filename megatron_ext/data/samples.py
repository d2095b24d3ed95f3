"""Samples of seq_length + 1 tokens from indexed datasets, epoch after epoch.

In each epoch the documents are put into a new random order and laid end to end; sample j covers tokens j*s to
(j+1)*s, the last of them only as a label, and the rest after the last whole sample is left out of this epoch.
Then the samples are put into a random order. So every document comes once per epoch, and what comes first
does not depend on how many epochs are drawn: a run may be made longer without seeing anything twice.
(megatron's GPTDataset shuffles the documents of all epochs together, in an order that changes with the number
of samples asked for.) Random orders come from numpy's RandomState,
whose streams are the same in all versions of numpy.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core.datasets import helpers
from torch import Tensor

from megatron_ext.data.documents import DocumentReader
from megatron_ext.data.index_cache import ArrayFile, StoredArray, cached_directory, file_states
from megatron_ext.data.indexed import REMEDY, index_lengths, outside_vocabulary, read_index
from megatron_ext.data.open_file import OpenFile, OpenFiles
from megatron_ext.errors import ConfigError

_PROBES = 64
_PROBE_TOKENS = 1024


@dataclass(frozen=True)
class Origin:
    """Where a sample begins: at token `offset` (from 0) of document `document` (from 0, in all of PREFIX.idx)
    of the dataset `prefix`. It may go on in other documents: each epoch lays them end to end in an order of
    its own."""

    prefix: str
    document: int
    offset: int

    def __str__(self) -> str:
        return f"dataset {self.prefix}, document {self.document}, token {self.offset}"


class SampleDataset(Protocol):
    """Samples by number: "tokens" and "labels", int64 [seq_length]; those of conversations have "begins",
    too."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...

    def origin(self, index: int) -> object:
        """Where sample `index` is from, in words. Raises IndexError as `[index]` does."""


@dataclass(frozen=True)
class DocumentRange:
    """Documents `first` to `last` (exclusive) of a dataset, with their tokens in all."""

    prefix: str
    first: int
    last: int
    tokens: int
    content: str
    """Hash of their lengths and of some of their tokens, 32 hexadecimal digits. Lengths alone decide how
    samples are cut; the tokens tell datasets apart that have documents of equal lengths."""

    def samples_per_epoch(self, seq_length: int) -> int:
        """Whole samples in one epoch."""
        return max(0, (self.tokens - 1) // seq_length)


def document_range(prefix: str, first: int, last: int) -> DocumentRange:
    """Count and hash the tokens of some documents."""
    tokens = position = begin = 0
    digest = hashlib.blake2b(digest_size=16)
    for lengths in index_lengths(prefix):
        start, stop = (min(max(0, end - position), len(lengths)) for end in (first, last))
        begin += int(lengths[:start].sum(dtype=np.int64))
        tokens += int(lengths[start:stop].sum(dtype=np.int64))
        digest.update(lengths[start:stop].tobytes())
        position += len(lengths)
    for probe in _probes(prefix, begin, tokens):
        digest.update(probe.astype("<i8").tobytes())
    return DocumentRange(prefix, first, last, tokens, digest.hexdigest())


def _probes(prefix: str, begin: int, tokens: int) -> Iterator[np.ndarray]:
    """Some tokens spread evenly over the `tokens` of a dataset from token `begin` on."""
    dtype, count = read_index(prefix).dtype, min(tokens, _PROBE_TOKENS)
    file = OpenFile(Path(f"{prefix}.bin"), f"Copy it again, or make it with {REMEDY}.")
    for start in np.unique(np.linspace(begin, begin + tokens - count, _PROBES, dtype=np.int64)).tolist():
        yield np.frombuffer(file.read(start * dtype.itemsize, count * dtype.itemsize), dtype)


def build_epochs(
    parent: Path, documents: DocumentRange, *, name: str, seq_length: int, samples: int, seed: tuple[int, ...]
) -> Path:
    """Build, or find, the index of enough epochs for `samples` samples. Returns its directory.

    It holds `documents.npy` int32 [epochs, documents], the order of the documents; `starts.npy` [epochs,
    samples + 1, 2], for each sample the place in that order and the token at which it begins; `order.npy`
    [epochs, samples], the order of the samples. Raises ConfigError if it cannot be written, is damaged, or
    there are too many documents.
    """
    if documents.last > np.iinfo(np.int32).max:
        raise ConfigError(
            f"{documents.prefix} has at least {documents.last} documents, but at most 2147483647 can be put "
            "in order. Make several datasets of it and blend them."
        )
    per_epoch = documents.samples_per_epoch(seq_length)
    epochs = max(1, math.ceil(samples / per_epoch))
    depends_on = {
        "index_version": 2,
        "files": file_states(str(Path(f"{documents.prefix}{end}").absolute()) for end in (".bin", ".idx")),
        "documents": [documents.first, documents.last],
        "seq_length": seq_length,
        "epochs": epochs,
        "seed": seed,
    }

    def build(directory: Path) -> None:
        _write_epochs(directory, documents, seq_length, epochs, seed)

    return cached_directory(parent, f"{Path(documents.prefix).name}-{name}", depends_on, build)


def _write_epochs(
    directory: Path, documents: DocumentRange, seq_length: int, epochs: int, seed: tuple[int, ...]
) -> None:
    lengths = np.concatenate(list(index_lengths(documents.prefix)))
    count, per_epoch = documents.last - documents.first, documents.samples_per_epoch(seq_length)
    wide = max(count, int(lengths.max())) > np.iinfo(np.int32).max
    kinds: Mapping[str, tuple[Any, tuple[int, ...]]] = {
        "documents": (np.int32, (epochs, count)),
        "starts": (np.int64 if wide else np.int32, (epochs, per_epoch + 1, 2)),
        "order": (np.uint32 if per_epoch < np.iinfo(np.uint32).max else np.int64, (epochs, per_epoch)),
    }
    files = {
        name: ArrayFile(directory / f"{name}.npy", np.dtype(d), shape) for name, (d, shape) in kinds.items()
    }
    for epoch in range(epochs):
        random = np.random.RandomState([number % 2**32 for number in (*seed, epoch)])
        order = (documents.first + random.permutation(count)).astype(np.int32)
        files["documents"].write(order)
        files["starts"].write(
            helpers.build_sample_idx(lengths, order, seq_length, 1, documents.tokens, True, True)
        )
        files["order"].write(random.permutation(per_epoch))
    for file in files.values():
        file.close()


class EpochSamples(torch.utils.data.Dataset):
    """The samples of one dataset, by an index that `build_epochs` has built: the first `length` of them."""

    def __init__(
        self,
        prefix: str,
        directory: str,
        *,
        length: int,
        seq_length: int,
        vocab_size: int,
        files: OpenFiles | None = None,
    ) -> None:
        """`files`: with which other datasets it shares descriptors."""
        self._files = OpenFiles() if files is None else files
        self._prefix = prefix
        self._directory = directory
        self._length = length
        self._seq_length = seq_length
        self._vocab_size = vocab_size
        self._documents, self._starts, self._order = (
            StoredArray(Path(directory) / f"{name}.npy", self._files)
            for name in ("documents", "starts", "order")
        )
        self._reader = DocumentReader(prefix, self._files)

    def __reduce__(self) -> Any:
        """Workers open the files themselves."""
        settings = {
            name: getattr(self, f"_{name}") for name in ("length", "seq_length", "vocab_size", "files")
        }
        return partial(EpochSamples, **settings), (self._prefix, self._directory)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, (first, begin), (last, end) = self._bounds(index)
        parts, total = [], 0
        for at, document in enumerate(self._order_of(epoch, first, last + 1 - first), first):
            offset = begin if at == first else 0
            length = end + 1 - offset if at == last else None
            parts.append(self._reader.read(document, offset, length))
            total += len(parts[-1])
            if total > self._seq_length + 1:
                break
        if total != self._seq_length + 1:
            raise self._starts.damaged(f"sample {index} does not have {self._seq_length + 1} tokens")
        text = np.concatenate(parts).astype(np.int64)
        lowest, highest = int(text.min()), int(text.max())
        if lowest < 0 or highest >= self._vocab_size:
            token = lowest if lowest < 0 else highest
            raise ConfigError(outside_vocabulary(self._prefix, token, self._vocab_size))
        tokens = torch.from_numpy(text)
        return {"tokens": tokens[:-1], "labels": tokens[1:]}

    def origin(self, index: int) -> Origin:
        """`SampleDataset.origin`."""
        epoch, (first, begin), _ = self._bounds(index)
        return Origin(self._prefix, self._order_of(epoch, first, 1)[0], begin)

    def _bounds(self, index: int) -> tuple[int, list[int], list[int]]:
        """The epoch of a sample, and where in the epoch's order of documents it begins and ends: the place
        in that order, and the token of the document there; at the end that of the last label."""
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length} of {self._prefix}")
        per_epoch = self._order.shape[1]
        sample = int(self._order.read(index, 1)[0])
        if not 0 <= sample < per_epoch:
            raise self._order.damaged(f"sample {index} is number {sample} of {per_epoch} in its epoch")
        epoch = index // per_epoch
        bounds = self._starts.read(2 * (epoch * (per_epoch + 1) + sample), 4)
        begin, end = bounds.reshape(2, 2).tolist()  # [4] -> [begin and end, place and token]
        if not [0, 0] <= begin <= end < [self._documents.shape[1], 0]:
            raise self._starts.damaged(f"sample {index} goes from {begin} to {end}")
        return epoch, begin, end

    def _order_of(self, epoch: int, first: int, count: int) -> list[int]:
        """Documents of an epoch, `count` of them from place `first` on."""
        return self._documents.read(epoch * self._documents.shape[1] + first, count).tolist()


class BlendedSamples(torch.utils.data.Dataset):
    """Samples of several datasets, dealt out by `source.npy` and `number.npy` (see `blends`)."""

    def __init__(
        self, sources: tuple[SampleDataset, ...], directory: str, files: OpenFiles | None = None
    ) -> None:
        """`files`: with which other datasets it shares descriptors."""
        self._files = OpenFiles() if files is None else files
        self._sources = sources
        self._directory = directory
        self._source = StoredArray(Path(directory) / "source.npy", self._files)
        self._number = StoredArray(Path(directory) / "number.npy", self._files)

    def __reduce__(self) -> Any:
        return BlendedSamples, (self._sources, self._directory, self._files)

    def __len__(self) -> int:
        return self._source.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        source, number = self._dealt(index)
        return source[number]

    def origin(self, index: int) -> object:
        """`SampleDataset.origin`."""
        source, number = self._dealt(index)
        return source.origin(number)

    def _dealt(self, index: int) -> tuple[SampleDataset, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} of a blend")
        source, number = int(self._source.read(index, 1)[0]), int(self._number.read(index, 1)[0])
        if not 0 <= source < len(self._sources):
            raise self._source.damaged(f"sample {index} is of source {source} of {len(self._sources)}")
        if not 0 <= number < len(self._sources[source]):
            raise self._number.damaged(f"sample {index} is number {number} of its source")
        return self._sources[source], number


class ShiftedSamples(torch.utils.data.Dataset):
    """Samples of a run that begin with number `first`, which is number `inner` of `samples`."""

    def __init__(self, samples: SampleDataset, *, first: int, inner: int) -> None:
        self._samples = samples
        self._first = first
        self._inner = inner

    def __len__(self) -> int:
        return len(self._samples) - self._inner + self._first

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._samples[self._shifted(index)]

    def origin(self, index: int) -> object:
        """`SampleDataset.origin`."""
        return self._samples.origin(self._shifted(index))

    def _shifted(self, index: int) -> int:
        if index < self._first:
            raise IndexError(f"sample {index}, but the present order begins with {self._first}")
        return index - self._first + self._inner
