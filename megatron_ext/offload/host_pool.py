"""The host's memory for activations: one pool, bounded, that allocates nothing once it has grown."""

import os
from collections import defaultdict

import torch
from torch import Tensor

from megatron_ext.errors import ConfigError

_ALIGNMENT = 512
"""Bytes; a multiple of every dtype's size."""


class Block:
    """Some bytes of the pool, which come back to it when the last reference goes."""

    __slots__ = ("_pool", "memory")

    def __init__(self, pool: "HostPool", memory: Tensor) -> None:
        """`memory`: uint8, of a size class."""
        self._pool, self.memory = pool, memory

    def __del__(self) -> None:
        self._pool.put_back(self.memory)


class HostPool:
    """Blocks of a few sizes, each a 2^n / 32 x (32 .. 63), so that at most 1/32 is wasted; a block that came
    back serves the next request of its size.

    Blocks are cut out of chunks, since pinned memory is costly to allocate and PyTorch pins powers of two. A
    chunk has room for eight blocks of the size that it is made for, so that at most an eighth of it is left.
    """

    def __init__(self, limit: int, *, pinned: bool, chunk: int | None = None) -> None:
        """`limit`: bytes of all chunks. `pinned`: for copies beside computation, CUDA only. `chunk`: bytes
        that are allocated at a time, at least, a power of two; 0: what is asked for. Default: a GiB of pinned
        memory, else 0."""
        self.limit, self._pinned = limit, pinned
        self._chunk = (2**30 if pinned else 0) if chunk is None else chunk
        self.allocated = 0
        """Bytes of all chunks."""
        self.used = 0
        """Bytes of blocks that are in use."""
        self._free: dict[int, list[Tensor]] = defaultdict(list)
        self._rests: list[Tensor] = []

    def take(self, size: int) -> Block:
        """A block of at least `size` bytes.

        Raises ConfigError where that is above the limit.
        """
        size = size_class(size)
        memory = self._free[size].pop() if self._free[size] else self._cut(size)
        self.used += size
        return Block(self, memory)

    def put_back(self, memory: Tensor) -> None:
        """Called by blocks."""
        self.used -= len(memory)
        self._free[len(memory)].append(memory)

    def _cut(self, size: int) -> Tensor:
        place = next((place for place, rest in enumerate(self._rests) if len(rest) >= size), None)
        rest = self._allocate(self._chunk_for(size)) if place is None else self._rests.pop(place)
        self._rests.append(rest[size:])
        return rest[:size]

    def _chunk_for(self, size: int) -> int:
        if not self._chunk:
            return size
        chunk = max(self._chunk, 1 << (8 * size - 1).bit_length())
        while chunk > self.limit - self.allocated:
            chunk //= 2
        return max(size, chunk)

    def _allocate(self, size: int) -> Tensor:
        if self.allocated + size > self.limit:
            raise ConfigError(
                f"activations of {self.allocated + size:,} bytes go to the host, of which "
                f"train.offload_host_gib gives this rank {self.limit:,}; lower train.offload_fraction or "
                "train.micro_batch_size, or raise train.offload_host_gib where the machine has more."
            )
        self.allocated += size
        return self._memory(size)

    def _memory(self, size: int) -> Tensor:
        """uint8 [size]."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)


def require_host_memory(expected_bytes: int) -> None:
    """Raises ConfigError where the ranks of this machine, with so many bytes each, need more than it has."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if ranks * expected_bytes > there:
        raise ConfigError(
            f"train.activation_offload is token_wise: {ranks} ranks of this machine put "
            f"{expected_bytes / 2**30:,.1f} GiB each into its memory, which is {there / 2**30:,.1f} GiB; "
            "lower train.offload_fraction, or train.offload_host_gib where the former is auto."
        )


def size_class(size: int) -> int:
    """The smallest size of a block that has `size` bytes."""
    step = max(_ALIGNMENT, 1 << max(0, size.bit_length() - 6))
    return max(1, -(-size // step)) * step
