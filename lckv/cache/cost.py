"""What the engine's inference cache costs, from sizes alone.

The cache is the engine's (lckv/cache/paged.py): pages from one pool. For a sequence of n tokens, per KV head
of each layer that computes keys and values,
    pages  ceil(slots / page size) for the slots that the KV policy needs; where only windowed layers read
    them, at most those
           in which W - 1 neighbouring tokens can lie
    table  4 bytes for each page that n tokens would fill with a slot each, and 8 for a length
    state  float32 of the KV policy
with CR = tokens per slot, taken to be the same for all heads, and bytes of a page = 2 x page size x d x bytes
of a number. Weights and activations are not counted.
"""

import math
from dataclasses import dataclass, replace

from lckv.config import CompressionConfig
from lckv.precision import bytes_of


@dataclass(frozen=True)
class CacheModel:
    """What the bytes of an inference cache depend on."""

    num_layers: int
    kv_heads: int
    head_dim: int
    compression: CompressionConfig
    dtype: str
    page_size: int
    compression_ratio: float
    """Tokens per slot."""

    @property
    def plain(self) -> "CacheModel":
        """A plain model of the same size."""
        return replace(self, compression=CompressionConfig(), compression_ratio=1.0)

    @property
    def slot_bytes(self) -> int:
        """Key and value of one KV head."""
        return 2 * self.head_dim * bytes_of(self.dtype)

    @property
    def page_bytes(self) -> int:
        """Of one page of one KV head."""
        return self.page_size * self.slot_bytes

    @property
    def layers(self) -> tuple[int, int]:
        """Layers that compute keys and values: those whose cache grows with the context, and those that only
        windowed layers read."""
        layer_types = self.compression.map(self.num_layers)
        windowed = len(layer_types.windowed_kv_layers)
        return len(layer_types.kv_layers) - windowed, windowed

    @property
    def bytes_per_token(self) -> float:
        """By which the cache of a long sequence grows."""
        return self.layers[0] * self.kv_heads * self.slot_bytes / self.compression_ratio

    @property
    def state_bytes(self) -> int:
        """What the KV policy keeps of a sequence besides slots."""
        numbers = self.compression.policy.state_numbers(self.head_dim)
        return sum(self.layers) * self.kv_heads * numbers * bytes_of("float32")

    def pages(self, tokens: int) -> int:
        """Of one sequence, at most, until it has so many tokens."""
        growing, windowed = self.layers
        slots = self.compression.policy.slots(tokens, self.compression_ratio)
        full = math.ceil(slots / self.page_size)
        kept = full
        if self.compression.sliding_window is not None:
            kept = min(full, pages_touched(self.compression.sliding_window - 1, self.page_size))
        return self.kv_heads * (growing * full + windowed * kept)

    def table_bytes(self, tokens: int) -> int:
        """By which a sequence's pages are found."""
        return sum(self.layers) * self.kv_heads * (4 * math.ceil(tokens / self.page_size) + 8)

    def sequence_bytes(self, tokens: int) -> int:
        """Of one sequence of so many tokens."""
        return self.pages(tokens) * self.page_bytes + self.table_bytes(tokens) + self.state_bytes


def pages_touched(slots: int, page_size: int) -> int:
    """Most pages in which so many neighbouring slots can lie."""
    return max(1, (slots + page_size - 2) // page_size + 1)


def largest_batch(model: CacheModel, tokens: int, memory: int) -> int:
    """Sequences of `tokens` tokens whose cache fits into `memory` bytes."""
    return memory // model.sequence_bytes(tokens)


def longest_context(model: CacheModel, batch: int, memory: int) -> int:
    """Tokens that each of `batch` sequences can have in `memory` bytes of cache."""
    low, high = 0, memory * model.page_size  # there is at least a byte for every page
    while low < high:
        middle = (low + high + 1) // 2
        if batch * model.sequence_bytes(middle) <= memory:
            low = middle
        else:
            high = middle - 1
    return low
