"""What a sequence of a paged cache held at some moment, kept beside it: other sequences can begin from it.

A snapshot holds the sequence's pages together with the sequence, and copies only what is small: lengths and
the KV policy's state, which has the running sums of the slot that is still open. So it is exact after any
token. Nothing is copied until somebody writes to a page that others hold (`PageTables.growth`).

Where every token has a slot of its own, a snapshot serves for every shorter beginning too. Otherwise what was
merged or dropped since cannot come back: it serves for its own tokens only. Layers with a window serve for as
many as their pages still show.

Shapes: l layers that compute keys and values, g KV heads, n tokens and c channels of a policy's state.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lckv.cache.page_tables import Integers
from lckv.cache.paged_memory import PagedMemory
from lckv.cache.pool import Pages


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Of one sequence; see `PagedCache.keep`."""

    tokens: int
    """That the sequence had."""

    fewest_tokens: int
    """It serves for so many of its first tokens, and any number from there to `tokens`."""

    lengths: Integers
    """[l, 1, g]: slots."""

    pages: Pages
    """Those of all heads, the first layer's first head first."""

    state: Tensor | None
    """float32 [l, n, g, c]: what the policy keeps; None: nothing."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes beside its pages."""
        state = 0 if self.state is None else self.state.numel() * self.state.element_size()
        return self.lengths.nbytes + self.pages.nbytes + state

    def lengths_of(self, tokens: int) -> Integers:
        """[l, 1, g]: slots of its first `tokens`. Raises ValueError where it does not serve for so many."""
        if tokens == self.tokens:
            return self.lengths
        if not self.fewest_tokens <= tokens <= self.tokens:
            raise ValueError(
                f"a snapshot of {self.tokens} tokens does not serve for {tokens}; it serves for "
                f"{self.fewest_tokens} to {self.tokens}."
            )
        return np.full_like(self.lengths, tokens)


def take_snapshot(memory: PagedMemory, sequence: int) -> Snapshot:
    """What `sequence` holds now; `drop_snapshot` gives the pages back."""
    # What may find no memory comes first.
    state = None if memory.state is None else memory.state[:, :, sequence].clone()
    tokens, lengths = int(memory.tokens[sequence]), memory.tables.lengths[:, [sequence]]
    pages = memory.tables.lend(sequence)
    memory.pool.share(pages, snapshot=True)
    fewest = memory.tables.fewest_tokens(lengths) if memory.keeps_every_token else tokens
    return Snapshot(tokens, fewest, lengths, pages, state)


def drop_snapshot(memory: PagedMemory, snapshot: Snapshot) -> None:
    """Give its pages back; it is not to be used any more."""
    memory.pool.give_back(snapshot.pages, snapshot=True)


def fill_from(memory: PagedMemory, sequence: int, snapshot: Snapshot, tokens: int) -> None:
    """Let an empty sequence hold the first `tokens` of a snapshot. Raises ValueError where it does not serve
    for so many."""
    held = snapshot.lengths_of(tokens)
    memory.version += 1
    memory.tables.fill(sequence, snapshot.lengths, snapshot.pages, held)
    # [l, 1, g] to [l, g]
    memory.lengths[:, sequence] = memory.lengths.new_tensor(held[:, 0])
    memory.seen[sequence] = tokens
    memory.tokens[sequence] = tokens
    if memory.state is not None and snapshot.state is not None:
        memory.state[:, :, sequence] = snapshot.state
