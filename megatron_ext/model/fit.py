"""Whether what a rank holds fits into a GPU: arithmetic on numbers, wherever these come from."""

from dataclasses import dataclass

RESERVED_BYTES = 2 * 2**30
"""CUDA's context and the buffers of communication."""
RESERVED_SHARE = 0.05
"""Of the memory: gaps between tensors."""


@dataclass(frozen=True)
class RankMemory:
    """What a rank holds at the worst moment of a step, in bytes."""

    state: int
    """Weights, gradients and the optimizer's state."""

    activations: int
    """Kept for backward, of all micro-batches in flight."""

    working: int
    """Needed for a while besides."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.state + self.activations + self.working


def usable_bytes(memory_bytes: int) -> int:
    """What of a GPU's memory a run can have for itself."""
    return max(0, round(memory_bytes * (1 - RESERVED_SHARE)) - RESERVED_BYTES)


def fits(needed: RankMemory, memory_bytes: int) -> bool:
    """Whether a GPU with so much memory is enough."""
    return needed.total <= usable_bytes(memory_bytes)
