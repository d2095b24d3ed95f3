"""The host's memory: bounded, and used again."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.errors import ConfigError
from megatron_ext.offload.host_pool import HostPool, require_host_memory, size_class


@given(st.integers(1, 2**40))
def test_a_size_class_wastes_at_most_an_eighth(size: int) -> None:
    given_size = size_class(size)
    assert given_size >= size
    assert given_size - size < max(512, size / 8)
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
    pool = HostPool(6144 + 1536, pinned=False, chunk=2048)
    first, second = pool.take(512), pool.take(512)
    assert pool.allocated == 2048
    assert second.memory.data_ptr() - first.memory.data_ptr() == 512
    large = pool.take(3072)
    assert pool.allocated == 2048 + 4096, "a power of two, since PyTorch pins such"
    rest = pool.take(1024)
    assert rest.memory.data_ptr() - first.memory.data_ptr() == 1024, "what was left of the first chunk"
    last = pool.take(1536)
    assert pool.allocated == 6144 + 1536, "no more than the limit"
    assert pool.used == 512 + 512 + 3072 + 1024 + 1536
    del first, second, large, rest, last
    assert pool.used == 0


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
