"""Samples of seq_length + 1 tokens from indexed datasets, epoch after epoch.

In each epoch the documents are put into a new random order and laid end to end; sample j covers tokens j*s to
(j+1)*s, the last of them only as a label, and the rest after the last whole sample is left out of this epoch.
Then the samples are put into a random order. So every document comes once per epoch, and what comes first
does not depend on how many epochs are drawn: a run may be made longer without seeing anything twice.
(megatron's GPTDataset shuffles the documents of all epochs together, in an order that changes with the number
of samples asked for.) Random orders come from numpy's RandomState,
whose streams are the same in all versions of numpy.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from megatron_ext.data.index_cache import ArrayFile, cached_directory, file_states, load_array
from megatron_ext.data.indexed import index_lengths, read_index
from megatron_ext.errors import ConfigError


class SampleDataset(Protocol):
    """Samples by number: "tokens" and "labels", int64 [seq_length]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...

    def describe(self, index: int) -> str:
        """Where the tokens of a sample come from."""
        ...


@dataclass(frozen=True)
class DocumentRange:
    """Documents `first` to `last` (exclusive) of a dataset, with their tokens in all."""

    prefix: str
    first: int
    last: int
    tokens: int

    def samples_per_epoch(self, seq_length: int) -> int:
        """Whole samples in one epoch."""
        return max(0, (self.tokens - 1) // seq_length)


def document_range(prefix: str, first: int, last: int) -> DocumentRange:
    """Count the tokens of some documents."""
    tokens = position = 0
    for lengths in index_lengths(prefix):
        inside = lengths[max(0, first - position) : max(0, last - position)]
        tokens += int(inside.sum(dtype=np.int64))
        position += len(lengths)
    return DocumentRange(prefix, first, last, tokens)


def build_epochs(
    parent: Path, documents: DocumentRange, *, name: str, seq_length: int, samples: int, seed: tuple[int, ...]
) -> Path:
    """Build, or find, the index of enough epochs for `samples` samples. Returns its directory.

    It holds `documents.npy` int32 [epochs, documents], the order of the documents; `starts.npy` [epochs,
    samples + 1, 2], for each sample the place in that order and the token at which it begins; `order.npy`
    [epochs, samples], the order of the samples.
    """
    per_epoch = documents.samples_per_epoch(seq_length)
    epochs = max(1, math.ceil(samples / per_epoch))
    depends_on = {
        "index_version": 1,
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

    def __init__(self, prefix: str, directory: str, *, length: int, vocab_size: int) -> None:
        read_index(prefix)
        self._prefix = prefix
        self._directory = directory
        self._length = length
        self._vocab_size = vocab_size
        self._documents, self._starts, self._order = (
            load_array(Path(directory) / f"{name}.npy") for name in ("documents", "starts", "order")
        )
        self._dataset = IndexedDataset(prefix)

    def __reduce__(self) -> Any:
        """Workers open the files themselves: a pickled memory map would carry all of its contents."""
        return partial(EpochSamples, length=self._length, vocab_size=self._vocab_size), (
            self._prefix,
            self._directory,
        )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, (first, begin), (last, end) = self._stretch(index)
        parts = []
        for at in range(first, last + 1):
            offset = begin if at == first else 0
            length = end + 1 - offset if at == last else None
            parts.append(self._dataset.get(int(self._documents[epoch, at]), offset=offset, length=length))
        text = np.concatenate(parts).astype(np.int64)
        lowest, highest = int(text.min()), int(text.max())
        if lowest < 0 or highest >= self._vocab_size:
            raise ConfigError(
                f"{self._prefix}.bin holds the token {lowest if lowest < 0 else highest}, but the vocabulary "
                f"has {self._vocab_size}. Set model.vocab_size to that of the tokenizer that made the "
                "dataset."
            )
        tokens = torch.from_numpy(text)
        return {"tokens": tokens[:-1], "labels": tokens[1:]}

    def _stretch(self, index: int) -> tuple[int, tuple[int, int], tuple[int, int]]:
        """Epoch of a sample; place in the order of its first document, and offset of its first token there;
        the same of its last label."""
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length} of {self._prefix}")
        epoch, place = divmod(index, self._order.shape[1])
        sample = int(self._order[epoch, place])
        (first, begin), (last, end) = self._starts[epoch, sample : sample + 2].tolist()
        return epoch, (first, begin), (last, end)

    def describe(self, index: int) -> str:
        """Document and offset, in tokens, of a sample's first token and of its last label."""
        epoch, (first, begin), (last, end) = self._stretch(index)
        documents = self._documents[epoch]
        return (
            f"{self._prefix}, document {documents[first]} from token {begin} to document {documents[last]} "
            f"token {end}"
        )


class BlendedSamples(torch.utils.data.Dataset):
    """Samples of several datasets, dealt out by `source.npy` and `number.npy` (see `blends`)."""

    def __init__(self, sources: tuple[EpochSamples, ...], directory: str) -> None:
        self._sources = sources
        self._directory = directory
        self._source = load_array(Path(directory) / "source.npy")
        self._number = load_array(Path(directory) / "number.npy")

    def __reduce__(self) -> Any:
        return BlendedSamples, (self._sources, self._directory)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} of a blend")
        return self._sources[self._source[index]][int(self._number[index])]

    def describe(self, index: int) -> str:
        """As the source that the sample is from says it."""
        return self._sources[self._source[index]].describe(int(self._number[index]))
