"""The training, validation and test samples of a run.

Rank 0 checks the data and builds the sample indices; the other ranks wait for it, then all open the same
files. Samples follow from the seed and the files alone.
"""

import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_ext.config import DataConfig
from megatron_ext.data.blends import (
    SPLITS,
    split_sources,
)
from megatron_ext.data.checks import check_data
from megatron_ext.data.first_rank import on_first_rank
from megatron_ext.data.mock import MockSamples
from megatron_ext.data.open_file import OpenFiles, open_limit
from megatron_ext.data.order import Continuation, Source, SourceUse, TrainingOrder, continue_order
from megatron_ext.data.packed_samples import PackedSamples
from megatron_ext.data.samples import (
    BlendedSamples,
    EpochSamples,
    SampleDataset,
    ShiftedSamples,
)
from megatron_ext.data.split_indices import SplitIndices, say_changes
from megatron_ext.errors import ConfigError

logger = logging.getLogger(__name__)

_MOCK_SAMPLES = 1000
_MOCK_EPOCH = 1 << 40
"""Mock documents never repeat."""
_FILES_OF_SOURCE = 5
"""Three of its index, and .bin and .idx."""
_SHARED_STORAGE_SECONDS = 30.0
"""How long a new file may take to be seen on another node."""


@dataclass(frozen=True)
class Datasets:
    """Samples of each split; None where a split has none."""

    train: SampleDataset | None
    valid: SampleDataset | None
    test: SampleDataset | None
    order: TrainingOrder | None = None
    """That of the training samples: what a resumed run needs to know."""
    uses: Mapping[str, Sequence[SourceUse]] = field(default_factory=dict)
    """What each split is drawn from, by the names of the splits."""


def build_datasets(
    data: DataConfig,
    *,
    seq_length: int,
    num_samples: tuple[int | None, int | None, int | None],
    seed: int,
    vocab_size: int,
    eod: int | None,
    resumed: Continuation | None = None,
) -> Datasets:
    """Build the splits; all ranks must call this.

    `num_samples` says how many samples training, validation and test draw: documents are repeated, epoch
    after epoch, as often as it takes. None: as many as there are without repeating any. 0, or no share in
    `data.split`: no dataset. The first samples are the same whatever the number. A run that is `resumed`
    goes on in its training data where it stood, from sample `resumed.consumed_samples` on. `eod` only shapes
    mock documents. `vocab_size` is that of the model, without padding.

    Raises ConfigError, on all ranks and before any index is built, for whatever `check_data` finds, if a
    split has too few tokens for one sample, and if a run cannot go on where it stood (`continue_order`);
    TimeoutError after `data.index_timeout_minutes`.
    """
    if data.mock:
        return _mock(num_samples, seq_length, seed, vocab_size, eod, resumed)

    def build() -> list[dict[str, Any] | None]:
        problems = check_data(data, vocab_size)
        if problems:
            raise ConfigError("\n".join(problems))
        return [
            None
            if sources is None or number == 0
            else SplitIndices(data, split, sources, seq_length, seed, None if split else resumed).build(
                number
            )
            for split, (sources, number) in enumerate(zip(split_sources(data), num_samples, strict=True))
        ]

    splits = on_first_rank(
        build,
        what="sample indices",
        timeout_minutes=data.index_timeout_minutes,
        timeout_setting="data.index_timeout_minutes",
    )
    train, valid, test = (
        None if split is None else _open(data, split, seq_length, (seed, number), vocab_size)
        for number, split in enumerate(splits)
    )
    return Datasets(
        train,
        valid,
        test,
        order=None if splits[0] is None else TrainingOrder.from_dict(splits[0]["order"]),
        uses={
            name: [
                SourceUse(source["prefix"], source["length"], source["per_epoch"])
                for source in split["sources"]
            ]
            for name, split in zip(SPLITS, splits, strict=True)
            if split is not None
        },
    )


def _mock(
    num_samples: Sequence[int | None],
    seq_length: int,
    seed: int,
    vocab_size: int,
    eod: int | None,
    resumed: Continuation | None,
) -> Datasets:
    content = f"vocabulary of {vocab_size}, end of document {eod}"
    source = Source("data.mock", content, seed, seq_length, per_epoch=_MOCK_EPOCH, weight=1.0)
    order, notes = continue_order(TrainingOrder(0, (source,)), resumed)
    say_changes(notes)
    samples = [_MOCK_SAMPLES if number is None else number for number in num_samples]
    first, inner = order.first_sample, order.sources[0].before
    lengths = [samples[0] - first + inner if samples[0] else 0, *samples[1:]]
    mocks: list[SampleDataset | None] = [
        MockSamples(length=n, seq_length=seq_length, vocab_size=vocab_size, eod=eod, seed=(seed, split))
        if n
        else None
        for split, n in enumerate(lengths)
    ]
    if mocks[0] is not None and first != inner:
        mocks[0] = ShiftedSamples(mocks[0], first=first, inner=inner)
    uses = {name: [SourceUse("data.mock", n, 0)] for name, n in zip(SPLITS, samples, strict=True) if n}
    train, valid, test = mocks
    return Datasets(train, valid, test, order=order if samples[0] else None, uses=uses)


def _open(
    data: DataConfig, split: dict[str, Any], seq_length: int, seed: tuple[int, int], vocab_size: int
) -> SampleDataset:
    for path in [split["blend"], *(source["directory"] for source in split["sources"])]:
        if path is not None:
            _wait_until_seen(Path(path))
    files = OpenFiles()
    kind: Callable[..., SampleDataset] = (
        partial(PackedSamples, seed=seed) if data.format == "chat" else EpochSamples
    )
    sources = tuple(
        kind(
            source["prefix"],
            source["directory"],
            length=source["length"],
            seq_length=seq_length,
            vocab_size=vocab_size,
            files=files,
        )
        for source in split["sources"]
    )
    _say_limit(len(sources), files)
    samples = sources[0] if split["blend"] is None else BlendedSamples(sources, split["blend"], files)
    first, inner = split["order"]["first_sample"], split["inner"]
    return samples if first == inner == 0 else ShiftedSamples(samples, first=first, inner=inner)


def _say_limit(datasets: int, files: OpenFiles) -> None:
    speaks = not dist.is_initialized() or dist.get_rank() == 0
    if speaks and _FILES_OF_SOURCE * datasets > files.limit:
        logger.info(
            "a blend of %d datasets: each process has at most %d of their files open at a time, and may have "
            "%d open in all (ulimit -n)",
            datasets,
            files.limit,
            open_limit(),
        )


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
