"""Samples of `seq_length` tokens from conversations, none of which is in two samples.

A conversation of n tokens takes n - 1 places: its last token is only a label. Which conversations share a
row is found once (`packing`) from an order that the seed decides; in each epoch the rows are put into a new
random order. So every conversation comes once per epoch, all epochs have equally many samples, and what comes
first does not depend on how many are drawn. What a row has left is padding.
"""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_ext.config import DataConfig
from megatron_ext.data.documents import DocumentReader
from megatron_ext.data.index_cache import StoredArray, cached_directory, file_states, save_array
from megatron_ext.data.indexed import index_lengths, outside_vocabulary
from megatron_ext.data.marks import unmarked
from megatron_ext.data.open_file import OpenFiles
from megatron_ext.data.packing import pack
from megatron_ext.data.samples import document_range
from megatron_ext.errors import ConfigError

logger = logging.getLogger(__name__)

PADDING = -1
"""In place of tokens and labels where there are none."""


@dataclass(frozen=True)
class PackedOrigin:
    """The conversations of a sample, by their numbers (from 0) in the dataset `prefix`."""

    prefix: str
    conversations: tuple[int, ...]

    def __str__(self) -> str:
        numbers = ", ".join(map(str, self.conversations))
        return f"dataset {self.prefix}, conversation{'s'[: len(self.conversations) != 1]} {numbers}"


def permutation(count: int, seed: tuple[int, ...], epoch: int) -> np.ndarray:
    """The random order of `count` things in an epoch, int64 [count]; the same with all versions of numpy."""
    return np.random.RandomState([number % 2**32 for number in (*seed, epoch)]).permutation(count)


class ChatSource:
    """Conversations of a dataset, packed (`SampleSource`)."""

    def __init__(
        self,
        prefix: str,
        first: int,
        last: int,
        *,
        data: DataConfig,
        seq_length: int,
        seed: tuple[int, ...],
        parent: Path,
        name: str,
    ) -> None:
        """Pack conversations `first` to `last` (exclusive), or find them packed in `parent`.

        Raises ConfigError where some are too long and `data.chat_overlong` is error.
        """
        self._documents = document_range(prefix, first, last)
        self._seq_length = seq_length
        self._rule = data.chat_overlong
        lengths = np.concatenate([np.zeros(0, np.int32), *index_lengths(prefix)])[first:last]
        self._overlong = int((lengths > seq_length + 1).sum())
        if self._overlong and self._rule == "error":
            raise ConfigError(
                f"{prefix} ({name}): {self._overlong:,} of {len(lengths):,} conversations are longer than "
                f"train.seq_length + 1 = {seq_length + 1} tokens, the longest has {lengths.max():,}. Raise "
                "train.seq_length, or set data.chat_overlong to truncate or drop."
            )
        depends_on = {
            "index_version": 1,
            "files": file_states(str(Path(f"{prefix}{end}").absolute()) for end in (".bin", ".idx")),
            "conversations": [first, last],
            "seq_length": seq_length,
            "chat_overlong": self._rule,
            "seed": seed,
        }
        self._directory = cached_directory(
            parent,
            f"{Path(prefix).name}-{name}",
            depends_on,
            partial(self._write, lengths=lengths, seed=seed),
        )
        rows = _PackedRows(self._directory)
        self.per_epoch = rows.count
        self._say(name, rows.conversations)

    @property
    def prefix(self) -> str:
        """`SampleSource.prefix`."""
        return self._documents.prefix

    @property
    def content(self) -> str:
        """`SampleSource.content`."""
        return f"{self._documents.content}-{self._rule}" if self._overlong else self._documents.content

    def shortage(self, share: str) -> str:
        """`SampleSource.shortage`."""
        documents = self._documents
        return (
            f"has {documents.last - documents.first} conversations{share} with something to learn in none of "
            f"them within train.seq_length + 1 = {self._seq_length + 1} tokens (data.chat_overlong="
            f"{self._rule}). Use more conversations, a longer train.seq_length or other shares."
        )

    def build(self, parent: Path, *, name: str, samples: int, seed: tuple[int, ...]) -> Path:
        """`SampleSource.build`; one index is enough for any number of samples."""
        return self._directory

    def _write(self, directory: Path, *, lengths: np.ndarray, seed: tuple[int, ...]) -> None:
        places = np.minimum(lengths - 1, self._seq_length)
        taken = places > 0
        if self._overlong:
            overlong = np.flatnonzero(lengths > self._seq_length + 1)
            taken[overlong] = self._rule == "truncate" and self._teach(overlong)
        shuffled = permutation(len(lengths), seed, 0)
        shuffled = shuffled[taken[shuffled]]
        items, bounds = pack(places[shuffled], self._seq_length)
        save_array(directory / "conversations.npy", self._documents.first + shuffled[items])
        save_array(directory / "rows.npy", bounds)

    def _teach(self, numbers: np.ndarray) -> np.ndarray:
        """Whether conversations of the range have something to learn after their end is cut off, bool."""
        reader, first, length = DocumentReader(self.prefix), self._documents.first, self._seq_length + 1
        return np.array([bool((reader.read(first + n, 0, length)[1:] >= 0).any()) for n in numbers.tolist()])

    def _say(self, name: str, packed: int) -> None:
        documents = self._documents
        count = documents.last - documents.first
        logger.info(
            "%s (%s): %s conversations in %s rows of train.seq_length=%d",
            self.prefix, name, f"{packed:,}", f"{self.per_epoch:,}", self._seq_length,
        )  # fmt: skip
        if self._overlong:
            logger.warning(
                "%s (%s): %s of %s conversations are longer than train.seq_length + 1 = %d tokens "
                "(data.chat_overlong=%s): the end of %s is cut off, %s are left out",
                self.prefix, name, f"{self._overlong:,}", f"{count:,}", self._seq_length + 1, self._rule,
                f"{self._overlong - (count - packed):,}", f"{count - packed:,}",
            )  # fmt: skip


class _PackedRows:
    """`conversations.npy` int64 [conversations], row by row, and `rows.npy` int64 [rows + 1], where each row
    begins in it."""

    def __init__(self, directory: Path, files: OpenFiles | None = None) -> None:
        self._conversations = StoredArray(directory / "conversations.npy", files)
        self._bounds = StoredArray(directory / "rows.npy", files)

    @property
    def conversations(self) -> int:
        """How many there are in all rows."""
        return self._conversations.shape[0]

    @property
    def count(self) -> int:
        """How many rows there are."""
        return self._bounds.shape[0] - 1

    def of(self, row: int) -> list[int]:
        """Numbers of the conversations of a row."""
        begin, end = self._bounds.read(row, 2).tolist()
        if not 0 <= begin < end <= self.conversations:
            raise self.damaged(f"row {row} goes from {begin} to {end}")
        return self._conversations.read(begin, end - begin).tolist()

    def damaged(self, reason: str) -> ConfigError:
        """The error for contents that cannot be."""
        return self._bounds.damaged(reason)


class PackedSamples(torch.utils.data.Dataset):
    """The first `length` samples of the rows that `ChatSource` has packed: "tokens" and "labels", int64
    [seq_length], `PADDING` where there is no token or nothing is learned; and "begins", bool [seq_length]:
    where a conversation begins, or the padding."""

    def __init__(
        self,
        prefix: str,
        directory: str,
        *,
        length: int,
        seq_length: int,
        vocab_size: int,
        seed: tuple[int, ...],
        files: OpenFiles | None = None,
    ) -> None:
        """`files`: with which other datasets it shares descriptors."""
        self._files = OpenFiles() if files is None else files
        self._prefix = prefix
        self._directory = directory
        self._length = length
        self._seq_length = seq_length
        self._vocab_size = vocab_size
        self._seed = seed
        self._rows = _PackedRows(Path(directory), self._files)
        self._reader = DocumentReader(prefix, self._files)
        self._shuffled = (-1, np.empty(0, np.int64))

    def __reduce__(self) -> Any:
        """Workers open the files themselves."""
        names = ("length", "seq_length", "vocab_size", "seed", "files")
        settings = {name: getattr(self, f"_{name}") for name in names}
        return partial(PackedSamples, **settings), (self._prefix, self._directory)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens, labels = (np.full(self._seq_length, PADDING, np.int64) for _ in range(2))
        begins = np.zeros(self._seq_length, bool)
        at = 0
        for number in self._conversations(index):
            stored = self._reader.read(number, 0, None)[: self._seq_length + 1].astype(np.int64)
            end = at + len(stored) - 1
            if end > self._seq_length:
                raise self._rows.damaged(f"sample {index} has more than {self._seq_length} tokens")
            tokens[at:end] = unmarked(stored)[:-1]
            labels[at:end] = np.maximum(stored[1:], PADDING)  # what is not learned is negative
            begins[at] = True
            self._check_vocabulary(int(unmarked(stored).max()))
            at = end
        if at < self._seq_length:
            begins[at] = True
        arrays = {"tokens": tokens, "labels": labels, "begins": begins}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def origin(self, index: int) -> PackedOrigin:
        """`SampleDataset.origin`."""
        return PackedOrigin(self._prefix, tuple(self._conversations(index)))

    def _conversations(self, index: int) -> list[int]:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length} of {self._prefix}")
        epoch, place = divmod(index, self._rows.count)
        return self._rows.of(int(self._order(epoch)[place]))

    def _order(self, epoch: int) -> np.ndarray:
        if self._shuffled[0] != epoch:
            self._shuffled = epoch, permutation(self._rows.count, (*self._seed, 1), epoch)
        return self._shuffled[1]

    def _check_vocabulary(self, highest: int) -> None:
        if highest >= self._vocab_size:
            raise ConfigError(outside_vocabulary(self._prefix, highest, self._vocab_size))
