"""The samples of one data-parallel rank, micro-batch by micro-batch, read ahead by worker processes.

The place in the data is one number for the whole run, the samples consumed so far. The next D * M samples (D
data-parallel ranks, M sequences per micro-batch) are one micro-batch of each rank:

    consumed | rank 0: M samples | rank 1: M samples | ... | rank D-1: M samples | then the next micro-batches

So a step of G samples takes samples consumed .. consumed + G - 1, whatever D and M.
"""

from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from megatron_ext.data.samples import SampleDataset
from megatron_ext.errors import ConfigError
from megatron_ext.signals import ignore_all

READ_TIMEOUT_SECONDS = 600
"""A batch that a worker has not read after this long (hanging storage) ends the run with an error."""

_PREFETCHED_BATCHES = 4


def build_data_iterator(
    dataset: SampleDataset,
    *,
    consumed_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    num_workers: int,
    seed: int,
) -> Generator[dict[str, Tensor]]:
    """Endless iterator over this rank's micro-batches: "tokens" and "labels", int64 [micro_batch_size,
    seq_length], and "sample_ids", int64 [micro_batch_size], the number of each sample in the dataset.

    It begins at sample `consumed_samples` of the dataset and leaves the random state of the process alone;
    `seed` is that of the workers, which draw nothing for the datasets of this package. Raises ConfigError
    for a sample that cannot be read, and when the samples are exhausted: nothing is read twice unnoticed.
    Close it: the reading processes end then.
    """
    batches = _RankBatches(
        samples=len(dataset),
        consumed=consumed_samples,
        micro_batch_size=micro_batch_size,
        rank=data_parallel_rank,
        ranks=data_parallel_size,
    )
    loader: DataLoader = DataLoader(
        _Numbered(dataset),
        batch_sampler=batches,
        num_workers=num_workers,
        prefetch_factor=_PREFETCHED_BATCHES if num_workers else None,
        timeout=READ_TIMEOUT_SECONDS if num_workers else 0,
        collate_fn=_collated,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),
        worker_init_fn=_leave_signals_to_the_run,
    )
    return _until_exhausted(loader, batches)


class _Numbered(Dataset):
    """Samples with their numbers; in place of one that cannot be read its error, which so reaches the run
    without the traceback that DataLoader would put into its message."""

    def __init__(self, samples: SampleDataset) -> None:
        self._samples = samples

    def __getitem__(self, index: int) -> dict[str, Tensor] | ConfigError:
        try:
            return {**self._samples[index], "sample_ids": torch.tensor(index)}
        except ConfigError as error:
            return error


def _collated(samples: list[dict[str, Tensor] | ConfigError]) -> Any:
    errors = [sample for sample in samples if isinstance(sample, ConfigError)]
    return errors[0] if errors else default_collate(samples)


class _RankBatches(Sampler[list[int]]):
    """Numbers of the samples of each micro-batch of one rank."""

    def __init__(self, *, samples: int, consumed: int, micro_batch_size: int, rank: int, ranks: int) -> None:
        self.samples = samples
        self._consumed = consumed
        self._micro_batch_size = micro_batch_size
        self._rank = rank
        self._ranks = ranks

    def __iter__(self) -> Iterator[list[int]]:
        size = self._micro_batch_size
        together = size * self._ranks
        for start in range(self._consumed, self.samples - together + 1, together):
            first = start + self._rank * size
            yield list(range(first, first + size))


def _until_exhausted(loader: DataLoader, batches: _RankBatches) -> Generator[dict[str, Tensor]]:
    reading = iter(loader)
    try:
        for samples in reading:
            if isinstance(samples, ConfigError):
                raise samples
            yield samples
    except RuntimeError as error:
        error.add_note(
            f"while data.num_workers={loader.num_workers} processes read samples; with 0 this process does"
        )
        raise
    finally:
        _end_readers(reading)
    raise ConfigError(
        f"the dataset's {batches.samples} samples are exhausted, and another micro-batch is asked for. Build "
        "it with more samples: train.train_iters * train.global_batch_size for training, train.eval_iters * "
        "train.global_batch_size for an evaluation."
    )


def _end_readers(reading: Any) -> None:
    """End the processes of DataLoader's iterator at once. An error keeps the iterator alive, and what Python
    does at its exit, a SIGTERM, is what readers ignore: it would wait for them without end."""
    if isinstance(reading, _MultiProcessingDataLoaderIter):
        reading._shutdown_workers()
        for process in reading._workers:
            if process.is_alive():  # stuck in a read
                process.kill()


def _leave_signals_to_the_run(_worker: int) -> None:
    """Batch systems signal all processes of a job;
    readers must live on while the run does its last step and saves."""
    ignore_all()
