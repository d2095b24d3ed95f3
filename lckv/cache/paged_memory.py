"""All that a paged cache allocates, once: slots in pages, who owns them, lengths, and what the KV policy
keeps of each sequence.

Shapes: l layers that compute keys and values, b all sequences, g KV heads, d channels, s new tokens.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from lckv.attention.pages import Pages, pages_of_a_chunk
from lckv.attention.ring import ring_size
from lckv.cache.page_tables import Integers, PageTables
from lckv.cache.pool import PagePool
from lckv.policies.base import KVPolicy, TokenContext, unturned


class PagedMemory:
    """See `PagedCache`, whose constructor says what the arguments mean."""

    def __init__(
        self,
        layers: Iterable[int],
        policy: KVPolicy,
        windows: Mapping[int, int],
        pool: PagePool,
        *,
        kv_heads: int,
        max_sequences: int,
        max_tokens: int,
    ) -> None:
        self.policy, self.pool, self.max_tokens = policy, pool, max_tokens
        self.page_size, device = pool.key.shape[1], pool.key.device
        self.number = {layer: number for number, layer in enumerate(layers)}
        """Of each layer, its place among those that compute keys and values."""
        self.windowed = bool(windows)
        """Whether some layers keep only the newest tokens."""
        chunk = pages_of_a_chunk(self.page_size, device.type)
        key_bias = policy.traits.key_bias
        ring = ring_size(key_bias)
        self.tables = PageTables(
            [windows.get(layer) for layer in self.number],
            pool,
            sequences=max_sequences,
            heads=kv_heads,
            columns=-(-max_tokens // (chunk * self.page_size)) * chunk,
            rewritten=int(key_bias is not None and ring == 0),
            ring=ring,
        )
        self.lengths = torch.zeros(self.tables.lengths.shape, dtype=torch.int64, device=device)
        """int64 [l, b, g]: slots so far."""
        self.seen = torch.zeros(max_sequences, dtype=torch.int64, device=device)
        """int64 [b]: tokens so far."""
        self.tokens: Integers = np.zeros(max_sequences, np.int64)
        """The same on the host."""
        self.state = self._make_state(max_sequences)
        """float32 [l, tokens of a state, b, g, channels of a state], zeros where there is no token; None: the
        policy keeps nothing."""
        self.keeps_every_token = policy.traits.keeps_every_token and self.state is None
        """Whether nothing but the newest slots has to be forgotten to forget the newest tokens."""
        self._pages = [Pages(pool.key, pool.value, table.flatten(0, 1)) for table in self.tables.table]
        self.version = 0
        """Changes whenever something is taken in or forgotten."""

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        tensors = (self.lengths, self.seen, self.state)
        rest = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
        return self.pool.num_bytes + self.tables.num_bytes + rest

    def pages_of(self, number: int) -> Pages:
        """What a layer keeps; the table has a row for each head of each sequence."""
        return self._pages[number]

    def forget(self, sequence: int) -> None:
        """Make a sequence empty; its pages are free."""
        self.version += 1
        self.tables.release(sequence)
        self.lengths[:, sequence] = 0
        self.seen[sequence] = 0
        self.tokens[sequence] = 0
        if self.state is not None:
            self.state[:, :, sequence] = 0

    def _make_state(self, sequences: int) -> Tensor | None:
        heads, channels = self.lengths.shape[-1], self.pool.key.shape[-1]
        token = torch.zeros(1, 1, heads, channels)
        positions = torch.zeros(1, 1, dtype=torch.int64)
        context = TokenContext(rotate=unturned, positions=positions)
        traits = self.policy.traits
        projected = None if traits.projection is None else token[..., :1]
        state = self.policy.extend(None, token, token, traits.read(token, projected), context).state
        if state is None:
            return None
        shape = (len(self.number), len(state), sequences, *state.shape[2:])
        return torch.zeros(shape, dtype=state.dtype, device=self.pool.key.device)
