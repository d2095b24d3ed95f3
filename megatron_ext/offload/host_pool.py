"""The host's memory for activations: one pool, bounded, that allocates nothing once it has grown."""

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
    """Blocks of a few sizes, each a 2^n / 8 x (8 .. 15), so that at most an eighth is wasted; a block that
    came back serves the next request of its size.

    Blocks are cut out of chunks, since pinned memory is costly to allocate and PyTorch gives powers of two.
    """

    def __init__(self, limit: int, *, pinned: bool, chunk: int = 2**28) -> None:
        """`limit`: bytes of all chunks. `pinned`: for copies beside computation, CUDA only. `chunk`: bytes
        that are allocated at a time where the memory is pinned."""
        self.limit, self._pinned, self._chunk = limit, pinned, chunk if pinned else 0
        self.allocated = 0
        """Bytes of all chunks."""
        self.used = 0
        """Bytes of blocks that are in use."""
        self._free: dict[int, list[Tensor]] = defaultdict(list)
        self._rest = torch.empty(0, dtype=torch.uint8)

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
        if len(self._rest) < size:
            self._rest = self._allocate(max(size, min(self._chunk, self.limit - self.allocated)))
        memory, self._rest = self._rest[:size], self._rest[size:]
        return memory

    def _allocate(self, size: int) -> Tensor:
        if self.allocated + size > self.limit:
            raise ConfigError(
                f"activations of {self.allocated + size:,} bytes go to the host, of which "
                f"train.offload_host_gib gives this rank {self.limit:,}; lower train.offload_fraction or "
                "train.micro_batch_size, or raise train.offload_host_gib where the machine has more."
            )
        self.allocated += size
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)


def size_class(size: int) -> int:
    """The smallest size of a block that has `size` bytes."""
    step = max(_ALIGNMENT, 1 << max(0, size.bit_length() - 4))
    return max(1, -(-size // step)) * step
