import multiprocessing
import os
import signal
import time
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_ext.data import loader
from megatron_ext.data.loader import build_data_iterator
from megatron_ext.data.samples import Origin
from megatron_ext.errors import ConfigError


class Numbers(torch.utils.data.Dataset):
    """Sample n is full of the number n."""

    def __init__(self, samples: int, bad: int | None = None) -> None:
        self.samples = samples
        self.bad = bad

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == self.bad:
            raise ConfigError("sample is bad")
        if self.bad is not None and self.bad < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"tokens": torch.full((4,), index), "labels": torch.full((4,), index + 1)}

    def origin(self, index: int) -> Origin:
        return Origin("numbers", index, 0)


def iterate(samples: int = 1000, **changes: Any) -> Any:
    settings = {
        "consumed_samples": 0,
        "micro_batch_size": 2,
        "data_parallel_rank": 0,
        "data_parallel_size": 1,
        "num_workers": 0,
        "seed": 1,
    }
    return build_data_iterator(Numbers(samples), **(settings | changes))


def numbers(batch: dict[str, Tensor]) -> list[int]:
    assert batch["labels"].equal(batch["tokens"] + 1)
    return batch["tokens"][:, 0].tolist()


@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_a_step_has_the_same_samples_on_every_layout(
    steps_done: int, micro_batch_size: int, ranks: int, micro_batches: int, more_steps: int
) -> None:
    global_batch = micro_batch_size * ranks * micro_batches
    consumed = steps_done * global_batch
    iterators = [
        iterate(
            consumed_samples=consumed,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
        )
        for rank in range(ranks)
    ]
    for step in range(more_steps + 1):
        seen = [
            number
            for iterator in iterators
            for batch in islice(iterator, micro_batches)
            for number in numbers(batch)
        ]
        assert sorted(seen) == list(
            range(consumed + step * global_batch, consumed + (step + 1) * global_batch)
        )


def test_order_within_a_step() -> None:
    of_rank = [
        [numbers(batch) for batch in islice(iterate(data_parallel_rank=rank, data_parallel_size=2), 2)]
        for rank in (0, 1)
    ]
    assert of_rank == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_workers_change_nothing() -> None:
    with_workers = iterate(num_workers=2, consumed_samples=3)
    batches = [numbers(batch) for batch in islice(with_workers, 40)]
    assert batches == [numbers(batch) for batch in islice(iterate(consumed_samples=3), 40)]
    with_workers.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_random_state_of_the_process_is_left_alone(num_workers: int) -> None:
    before = torch.get_rng_state()
    next(iterate(num_workers=num_workers))
    assert torch.get_rng_state().equal(before)


def test_nothing_is_read_twice() -> None:
    iterator = iterate(samples=9, micro_batch_size=2, data_parallel_size=2, data_parallel_rank=1)
    assert [numbers(batch) for batch in islice(iterator, 2)] == [[2, 3], [6, 7]]
    with pytest.raises(ConfigError, match=r"the dataset's 9 samples are exhausted.*train\.train_iters"):
        next(iterator)
    with pytest.raises(ConfigError, match="exhausted"):
        next(iterate(samples=9, consumed_samples=9))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_sample_is_an_error_of_its_own_kind(num_workers: int) -> None:
    settings = {
        "micro_batch_size": 1,
        "data_parallel_rank": 0,
        "data_parallel_size": 1,
        "num_workers": num_workers,
        "seed": 1,
    }
    before = set(multiprocessing.active_children())
    iterator = build_data_iterator(Numbers(10, bad=3), consumed_samples=0, **settings)
    with pytest.raises(ConfigError, match="sample is bad") as caught:
        list(iterator)
    # The error keeps DataLoader's iterator alive; its readers, which ignore SIGTERM, would keep Python from
    # ending.
    assert caught.value is not None and set(multiprocessing.active_children()) <= before


def test_the_death_of_a_worker_is_an_error() -> None:
    settings = {
        "micro_batch_size": 1,
        "data_parallel_rank": 0,
        "data_parallel_size": 1,
        "num_workers": 1,
        "seed": 1,
    }
    iterator = build_data_iterator(Numbers(10, bad=-1), consumed_samples=0, **settings)
    with pytest.raises(RuntimeError, match=r"killed by signal|exited unexpectedly") as caught:
        next(iterator)
    assert "data.num_workers=1" in caught.value.__notes__[0]


class Stuck(Numbers):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        time.sleep(4)
        return super().__getitem__(index)


def test_hanging_storage_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "READ_TIMEOUT_SECONDS", 1)
    settings = {
        "micro_batch_size": 1,
        "data_parallel_rank": 0,
        "data_parallel_size": 1,
        "num_workers": 1,
        "seed": 1,
    }
    iterator = build_data_iterator(Stuck(10), consumed_samples=0, **settings)
    with pytest.raises(RuntimeError, match="timed out after 1 seconds"):
        next(iterator)
