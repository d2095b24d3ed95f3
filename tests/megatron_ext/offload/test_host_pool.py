"""The host's memory: bounded, and used again."""

import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.errors import ConfigError
from megatron_ext.offload.host_pool import HostPool, require_host_memory, size_class
from megatron_ext.offload.share import POOL_SHARE


@given(st.integers(1, 2**40))
def test_a_size_class_wastes_at_most_a_32nd(size: int) -> None:
    given_size = size_class(size)
    assert given_size >= size
    assert given_size - size < max(512, size / 32)
    assert size_class(given_size) == given_size


def test_blocks_come_back_and_are_used_again() -> None:
    pool = HostPool(10_000, pinned=False)
    blocks = [pool.take(1000) for _ in range(3)]
    assert (pool.used, pool.allocated) == (3072, 3072)
    places = {block.memory.data_ptr() for block in blocks}
    del blocks
    assert pool.used == 0
    again = [pool.take(1024) for _ in range(3)]
    assert {block.memory.data_ptr() for block in again} == places
    assert pool.allocated == 3072


def test_blocks_are_cut_out_of_chunks() -> None:
    pool = HostPool(4096 + 16384 + 1536, pinned=False, chunk=4096)
    first, second = pool.take(512), pool.take(512)
    assert pool.allocated == 4096
    assert second.memory.data_ptr() - first.memory.data_ptr() == 512
    large = [pool.take(1536) for _ in range(12)]
    assert pool.allocated == 4096 + 16384, "a power of two, since PyTorch pins such, for eight of them"
    rest = pool.take(1024)
    assert pool.allocated == 4096 + 16384
    last = pool.take(1536)
    assert pool.allocated == 4096 + 16384 + 1536, "no more than the limit"
    assert pool.used == 512 + 512 + 12 * 1536 + 1024 + 1536
    del first, second, large, rest, last
    assert pool.used == 0


@given(st.lists(st.integers(2**20, 2**31), min_size=1, max_size=8), st.integers(1, 100))
def test_what_is_expected_to_fit_fits(sizes: list[int], layers: int) -> None:
    """Of any sizes, if no single one is a large part of all; nothing is allocated."""
    needed = layers * sum(sizes)
    pool = Counted(math.ceil(needed / POOL_SHARE) + 16 * max(sizes), pinned=False, chunk=2**30)
    assert [pool.take(size) for _ in range(layers) for size in sizes]


class Counted(HostPool):
    """A pool whose memory is not there."""

    def _memory(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device="meta")


def test_the_limit() -> None:
    pool = HostPool(2048, pinned=False)
    kept = pool.take(2048)
    with pytest.raises(
        ConfigError, match=r"2,560 bytes go to the host.*train.offload_host_gib .*2,048; lower"
    ):
        pool.take(1)
    del kept
    pool.take(2048)


def test_memory_that_the_machine_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    require_host_memory(there // 4)
    with pytest.raises(
        ConfigError, match=r"2 ranks of this machine put .* GiB each into its memory, which is"
    ):
        require_host_memory(there // 2 + 1)
