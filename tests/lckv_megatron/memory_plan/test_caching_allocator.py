"""The simulated allocator against sequences followed by hand, by the rules that PyTorch documents."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lckv_megatron.memory_plan.caching_allocator import Block, CachingAllocator, Reserved, run
from lckv_megatron.memory_plan.requests import Request

KIB, MIB = 2**10, 2**20
both = pytest.mark.parametrize("expandable", [False, True], ids=["segments", "expandable"])


def allocator(*mib: float, expandable: bool = False) -> tuple[CachingAllocator, list[Block]]:
    """One that has served requests of so many MiB."""
    made = CachingAllocator(expandable=expandable)
    return made, [made.allocate(int(number * MIB)) for number in mib]


@both
def test_sizes_are_rounded_to_512_bytes(expandable: bool) -> None:
    made = CachingAllocator(expandable=expandable)
    for number, live in ((1, 512), (512, 1024), (513, 2048)):
        made.allocate(number)
        assert made.live == live
    assert made.reserved == 2 * MIB


@both
def test_small_requests_share_segments_of_2_mib(expandable: bool) -> None:
    made, _ = allocator(0.5, 0.5, 0.5, 0.5, expandable=expandable)
    assert made.reserved == 2 * MIB
    made.allocate(512)
    assert made.reserved == 4 * MIB


@both
def test_one_mib_is_small_and_more_is_large(expandable: bool) -> None:
    assert allocator(1, expandable=expandable)[0].reserved == 2 * MIB
    made = CachingAllocator(expandable=expandable)
    made.allocate(MIB + 1)
    assert made.reserved == 20 * MIB


@pytest.mark.parametrize(
    ("mib", "segments", "expandable"),
    [(9.5, 20, 20), (10, 10, 20), (10.5, 12, 20), (21, 22, 40), (40, 40, 40)],
)
def test_what_a_large_request_reserves(mib: float, segments: int, expandable: int) -> None:
    assert allocator(mib)[0].reserved == segments * MIB
    assert allocator(mib, expandable=True)[0].reserved == expandable * MIB


def test_a_block_of_20_mib_is_split_while_more_than_1_mib_is_left() -> None:
    made, blocks = allocator(9, 9.5)
    assert made.reserved == 20 * MIB
    assert [block.bytes for block in blocks] == [9 * MIB, 9.5 * MIB]  # 1.5 MiB are left: split
    made, blocks = allocator(9, 10)
    assert blocks[1].bytes == 11 * MIB  # 1 MiB is left: not split
    assert made.live == 19 * MIB


def test_in_expandable_segments_every_rest_is_split() -> None:
    _, blocks = allocator(9, 10, expandable=True)
    assert blocks[1].bytes == 10 * MIB


def test_the_smallest_block_that_fits_serves_then_the_lowest() -> None:
    made, blocks = allocator(40, 30, 30)
    for block in blocks:
        made.free(block)
    assert made.allocate(25 * MIB).address == blocks[1].address == 40 * MIB
    assert made.allocate(25 * MIB).address == 70 * MIB
    assert made.allocate(25 * MIB).address == 0
    assert made.allocate(4 * MIB).address == 65 * MIB  # what the first has left is 5 MiB
    assert made.reserved == 100 * MIB


@both
def test_freed_neighbours_are_joined(expandable: bool) -> None:
    made, (first, second, third) = allocator(4, 4, 4, expandable=expandable)
    made.free(first)
    made.free(third)
    made.allocate(9 * MIB)  # behind the second: 12 MiB are free there
    made.free(second)
    assert made.allocate(8 * MIB).address == 0
    assert made.reserved == 20 * MIB


def test_segments_do_not_join_and_expandable_ones_are_one() -> None:
    sizes, reserved = (12, 12), []
    for expandable in (False, True):
        made, blocks = allocator(*sizes, expandable=expandable)
        for block in blocks:
            made.free(block)
        made.allocate(24 * MIB)
        reserved.append(made.reserved // MIB)
    assert reserved == [12 + 12 + 24, 40]


def test_an_expandable_segment_grows_by_what_its_end_lacks() -> None:
    made, (first,) = allocator(12, expandable=True)
    assert made.reserved == 20 * MIB
    assert made.allocate(27 * MIB).address == 12 * MIB  # 8 are free at the end, 19 are missing
    assert made.reserved == 40 * MIB
    made.free(first)
    assert made.allocate(13 * MIB).address == 39 * MIB
    assert made.reserved == 60 * MIB


def test_the_end_of_an_expandable_segment_serves_last() -> None:
    made, (first, *_) = allocator(10, 5, expandable=True)
    made.free(first)
    assert made.allocate(4 * MIB).address == 0  # 5 MiB at the end would fit better
    assert made.allocate(6 * MIB).address == 4 * MIB
    assert made.allocate(5 * MIB).address == 15 * MIB
    assert made.reserved == 20 * MIB


def test_a_run_tells_the_most_of_both() -> None:
    requests = [Request(12 * MIB, 0, 2), Request(12 * MIB, 1, 3), Request(24 * MIB, 4, 5)]
    assert run(requests, expandable=False) == Reserved(48 * MIB, 24 * MIB)
    assert run(requests, expandable=True) == Reserved(40 * MIB, 24 * MIB)
    assert run(requests, expandable=False).fragmentation == 0.5
    assert run([], expandable=True).fragmentation == 0


STEPS = st.lists(
    st.one_of(st.integers(1, 3 * MIB), st.integers(MIB, 50 * MIB), st.integers(-9, -1)), max_size=40
)
"""Bytes that are requested, or the number from behind of a block that is freed."""


@both
@settings(max_examples=40, deadline=None)
@given(steps=STEPS)
def test_blocks_in_use_never_overlap_and_nothing_is_lost(expandable: bool, steps: list[int]) -> None:
    made, used, sizes = CachingAllocator(expandable=expandable), [], []
    for step in steps:
        if step > 0:
            used.append(made.allocate(step))
            sizes.append(step)
        elif used:
            index = step % len(used)
            made.free(used.pop(index))
            sizes.pop(index)
        in_order = sorted(used, key=lambda block: (block.pool.small, block.address))
        for first, second in pairwise(in_order):
            assert first.pool is not second.pool or first.address + first.bytes <= second.address
        assert all(block.bytes >= size for block, size in zip(used, sizes, strict=True))
        assert made.live <= made.most_live <= made.reserved
    for block in used:
        made.free(block)
    assert made.live == 0
    for pool in {block.pool for block in used} if expandable else ():  # all is one block again
        before = pool.reserved
        assert pool.allocate(before).address == 0
        assert pool.reserved == before
