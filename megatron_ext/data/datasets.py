"""The training, validation and test samples of a run.

Rank 0 checks the data and builds the sample indices; the other ranks wait for it, then all open the same
files. Samples follow from the seed and the files alone.
"""

import logging
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_ext.config import DataConfig
from megatron_ext.data.blends import (
    SPLITS,
    SplitSources,
    deal_all_samples,
    deal_samples,
    deal_without_repeats,
    split_sources,
)
from megatron_ext.data.checks import check_data
from megatron_ext.data.first_rank import on_first_rank
from megatron_ext.data.index_cache import cache_parent, cached_directory, save_array
from megatron_ext.data.indexed import read_index
from megatron_ext.data.mock import MockSamples
from megatron_ext.data.samples import (
    BlendedSamples,
    DocumentRange,
    EpochSamples,
    SampleDataset,
    build_epochs,
    document_range,
)
from megatron_ext.errors import ConfigError

logger = logging.getLogger(__name__)

_MOCK_SAMPLES = 1000
_SHARED_STORAGE_SECONDS = 30.0
"""How long a new file may take to be seen on another node."""


@dataclass(frozen=True)
class Datasets:
    """Samples of each split; None where a split has none."""

    train: SampleDataset | None
    valid: SampleDataset | None
    test: SampleDataset | None


def build_datasets(
    data: DataConfig,
    *,
    seq_length: int,
    num_samples: tuple[int | None, int | None, int | None],
    seed: int,
    vocab_size: int,
    eod: int | None,
) -> Datasets:
    """Build the splits; all ranks must call this.

    `num_samples` says how many samples training, validation and test draw: documents are repeated, epoch
    after epoch, as often as it takes. None: as many as there are without repeating any. 0, or no share in
    `data.split`: no dataset. The first samples are the same whatever the number. `eod` only shapes mock
    documents. `vocab_size` is that of the model, without padding.

    Raises ConfigError, on all ranks and before any index is built, for whatever `check_data` finds, and if a
    split has too few tokens for one sample; TimeoutError after `data.index_timeout_minutes`.
    """
    if data.mock:
        samples = [_MOCK_SAMPLES if number is None else number for number in num_samples]
        mocks = [
            MockSamples(length=n, seq_length=seq_length, vocab_size=vocab_size, eod=eod, seed=(seed, split))
            if n
            else None
            for split, n in enumerate(samples)
        ]
        return Datasets(*mocks)

    def build() -> list[dict[str, Any] | None]:
        problems = check_data(data, vocab_size)
        if problems:
            raise ConfigError("\n".join(problems))
        return [
            None
            if sources is None or number == 0
            else _Split(data, split, sources, seq_length, seed).build(number)
            for split, (sources, number) in enumerate(zip(split_sources(data), num_samples, strict=True))
        ]

    splits = on_first_rank(
        build,
        what="sample indices",
        timeout_minutes=data.index_timeout_minutes,
        timeout_setting="data.index_timeout_minutes",
    )
    return Datasets(*(None if split is None else _open(split, seq_length, vocab_size) for split in splits))


@dataclass(frozen=True)
class _Split:
    """One split while its indices are built."""

    data: DataConfig
    split: int
    sources: SplitSources
    seq_length: int
    seed: int

    def build(self, samples: int | None) -> dict[str, Any] | None:
        """Build the indices. Returns what `_open` needs, as plain JSON; None if there is no sample and none
        is asked for."""
        ranges, weights = self._usable_ranges(samples)
        if not ranges:
            return None
        per_epoch = [documents.samples_per_epoch(self.seq_length) for documents in ranges]
        counts, blend = [per_epoch[0] if samples is None else samples], None
        if len(ranges) > 1:
            source, number = self._deal(weights, per_epoch, samples)
            counts = np.bincount(source, minlength=len(ranges)).tolist()
            depends_on = {"index_version": 2, "weights": weights, "per_epoch": per_epoch, "samples": samples}
            blend = str(self._save_blend(self._cache(ranges[0]), depends_on, source, number))
        logger.info(
            "%s: %s samples of %s", SPLITS[self.split], counts, [documents.prefix for documents in ranges]
        )
        directories = [
            self._build_source(documents, count) for documents, count in zip(ranges, counts, strict=True)
        ]
        sources = [
            {"prefix": documents.prefix, "directory": str(directory), "length": count}
            for documents, directory, count in zip(ranges, directories, counts, strict=True)
        ]
        return {"sources": sources, "blend": blend}

    def _usable_ranges(self, samples: int | None) -> tuple[list[DocumentRange], Sequence[float] | None]:
        """The documents of each source, with its weight if weights are given.

        A source that counts by its size may turn out too small for one sample. Any other may not.
        """
        blend = self.sources.blend
        weights = blend.weights if len(blend.prefixes) > 1 else None
        ranges = [
            document_range(prefix, *self.sources.documents(read_index(prefix).sequences))
            for prefix in blend.prefixes
        ]
        small = [documents for documents in ranges if not documents.samples_per_epoch(self.seq_length)]
        if small and (weights is not None or (len(small) == len(ranges) and samples is not None)):
            raise ConfigError(self._too_small(small[0]))
        for documents in small:
            logger.warning("%s Its tokens are left out.", self._too_small(documents))
        return [documents for documents in ranges if documents.samples_per_epoch(self.seq_length)], weights

    def _too_small(self, documents: DocumentRange) -> str:
        share = f", its share by data.split={self.data.split}," if self.data.data_path else ""
        return (
            f"the {SPLITS[self.split]} split of {documents.prefix} has {documents.last - documents.first} "
            f"documents{share} with {documents.tokens} tokens in all, but one sample takes train.seq_length "
            f"+ 1 = {self.seq_length + 1}. Use more text, a shorter train.seq_length or other shares."
        )

    def _deal(
        self, weights: Sequence[float] | None, per_epoch: Sequence[int], samples: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        if samples is not None:
            return deal_samples(weights or per_epoch, samples)
        return deal_all_samples(per_epoch) if weights is None else deal_without_repeats(weights, per_epoch)

    def _save_blend(
        self, cache: Path, depends_on: dict[str, Any], source: np.ndarray, number: np.ndarray
    ) -> Path:
        def build(directory: Path) -> None:
            save_array(directory / "source.npy", source)
            save_array(directory / "number.npy", number)

        return cached_directory(cache, f"blend-{SPLITS[self.split]}", depends_on, build)

    def _build_source(self, documents: DocumentRange, samples: int) -> Path:
        return build_epochs(
            self._cache(documents),
            documents,
            name=SPLITS[self.split],
            seq_length=self.seq_length,
            samples=samples,
            seed=(self.seed, self.split),
        )

    def _cache(self, documents: DocumentRange) -> Path:
        return cache_parent(self.data.data_cache_path, documents.prefix)


def _open(split: dict[str, Any], seq_length: int, vocab_size: int) -> SampleDataset:
    for path in [split["blend"], *(source["directory"] for source in split["sources"])]:
        if path is not None:
            _wait_until_seen(Path(path))
    sources = tuple(
        EpochSamples(
            source["prefix"],
            source["directory"],
            length=source["length"],
            seq_length=seq_length,
            vocab_size=vocab_size,
        )
        for source in split["sources"]
    )
    return sources[0] if split["blend"] is None else BlendedSamples(sources, split["blend"])


def _wait_until_seen(directory: Path) -> None:
    """Wait for a directory that rank 0 has made to be seen here too, through a network file system."""
    deadline = time.monotonic() + _SHARED_STORAGE_SECONDS
    while not directory.is_dir():
        if time.monotonic() > deadline:
            rank = dist.get_rank() if dist.is_initialized() else 0
            raise ConfigError(
                f"rank {rank} on {socket.gethostname()} does not see {directory}, which rank 0 has made. "
                "Datasets and data.data_cache_path must be on storage that all nodes share."
            )
        time.sleep(0.5)
