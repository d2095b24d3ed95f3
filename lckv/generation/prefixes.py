"""Beginnings of texts that were computed before, for requests that begin alike.

A beginning is a snapshot of a sequence of the cache (`lckv/cache/snapshots.py`) under its tokens. Snapshots
hold pages that no request needs at the moment; the scheduler drops the least recently used ones when requests
need pages. Tokens themselves are compared, never hashes alone.

Beginnings stand in the order of their tokens. So those that have the most in common with a text are next to
the place where it would stand:

    1 2 7          a text  1 2 8 3 | 5 ...   no more than 4 tokens are wanted
    1 2 8          -> the longest that it begins with, where a snapshot serves for its own tokens only
    1 2 8 3 4      -> this one, where it serves for its first 4 tokens too
    9
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from lckv.cache.paged import PagedCache, Snapshot

_MOST_SNAPSHOTS = 1024
_SHARE_OF_CACHE = 1 / 8
"""Bytes of all snapshots beside their pages, at most, as a share of those of the cache. It is the state of a
KV policy that counts."""

_TOKEN = np.dtype(">u4")
"""In this order of bytes, bytes are in the order of tokens."""


class Beginning(NamedTuple):
    """The first tokens of a text, in the cache already."""

    snapshot: Snapshot | None = None
    """None: there are none."""

    tokens: int = 0


class Prefixes:
    """Snapshots of a cache, by their tokens. Only the thread that runs the engine's step uses it."""

    def __init__(self, cache: PagedCache, *, enabled: bool = True) -> None:
        """`enabled`: otherwise nothing is ever kept."""
        self._cache, self.enabled = cache, enabled
        # From tokens to snapshots, the least recently used first; and the tokens in their order.
        self._snapshots: OrderedDict[bytes, Snapshot] = OrderedDict()
        self._order: list[bytes] = []
        self._bytes = 0

    def __len__(self) -> int:
        """Snapshots."""
        return len(self._order)

    def find(self, tokens: Sequence[int], most: int) -> Beginning:
        """The longest beginning of `tokens`, of at most `most` and at least a page of them."""
        if not self._order or most < self._cache.page_size:
            return Beginning()
        text = _bytes(tokens[:most])
        for beginning in self._candidates(text):
            start, stop = self._extending(beginning)
            count = len(beginning) // _TOKEN.itemsize
            for name in self._order[start:stop]:
                if self._snapshots[name].fewest_tokens <= count:
                    self._snapshots.move_to_end(name)
                    return Beginning(self._snapshots[name], count)
        return Beginning()

    def keep(self, tokens: Sequence[int], sequence: int) -> None:
        """Remember what a sequence, which has taken in `tokens`, holds now; or that it is known already."""
        if not self.enabled or len(tokens) < self._cache.page_size:
            return
        if self.find(tokens, len(tokens)).tokens == len(tokens):
            return
        try:
            name, snapshot = _bytes(tokens), self._cache.keep(sequence)
        except torch.OutOfMemoryError:  # for the policy's state; nobody needs it
            return
        self._snapshots[name] = snapshot
        insort(self._order, name)
        self._bytes += _size(name, snapshot)
        for shorter in self._served_by(name, snapshot):
            self._drop(shorter)
        while len(self) > _MOST_SNAPSHOTS or self._bytes > _SHARE_OF_CACHE * self._cache.num_bytes:
            self._drop(next(iter(self._snapshots)))

    def make_room(self, pages: int) -> bool:
        """Whether so many pages are free, after dropping as many snapshots as it takes; if it is certain that
        that does not suffice, none are dropped."""
        if pages > self._cache.pages_free + self._cache.pages_kept:
            return False
        while pages > self._cache.pages_free and self._snapshots:
            self._drop(next(iter(self._snapshots)))
        return pages <= self._cache.pages_free

    def clear(self) -> None:
        """Forget all beginnings."""
        for name in list(self._order):
            self._drop(name)

    def _candidates(self, text: bytes) -> Iterator[bytes]:
        """The beginnings of a text from the longest on that end where a snapshot's tokens end, or differ from
        it; of at least a page."""
        while len(text) >= self._cache.page_size * _TOKEN.itemsize:
            yield text
            start, stop = self._extending(text)
            neighbours = self._order[max(0, start - 1) : start] + self._order[stop : stop + 1]
            text = text[: max((_common(name, text) for name in neighbours), default=0)]

    def _extending(self, text: bytes) -> tuple[int, int]:
        """Where, in order, those stand that begin with `text`."""
        start = bisect_left(self._order, text)
        return start, bisect_left(self._order, text + b"\xff" * _TOKEN.itemsize, lo=start)

    def _served_by(self, name: bytes, snapshot: Snapshot) -> list[bytes]:
        """Shorter beginnings of the same text that `snapshot` serves for as well."""
        shorter = [text for text in self._candidates(name) if text in self._snapshots and text != name]
        return [text for text in shorter if snapshot.fewest_tokens <= self._snapshots[text].fewest_tokens]

    def _drop(self, name: bytes) -> None:
        snapshot = self._snapshots.pop(name)
        del self._order[bisect_left(self._order, name)]
        self._bytes -= _size(name, snapshot)
        self._cache.drop(snapshot)


def common_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """With how many equal tokens two texts begin."""
    return _common(_bytes(one), _bytes(other)) // _TOKEN.itemsize


def _common(one: bytes, other: bytes) -> int:
    """Bytes of the tokens with which both begin."""
    length = min(len(one), len(other)) // _TOKEN.itemsize
    different = np.flatnonzero(np.frombuffer(one, _TOKEN, length) != np.frombuffer(other, _TOKEN, length))
    return _TOKEN.itemsize * (int(different[0]) if len(different) else length)


def _bytes(tokens: Sequence[int]) -> bytes:
    return np.array(tokens, _TOKEN).tobytes()


def _size(name: bytes, snapshot: Snapshot) -> int:
    return len(name) + snapshot.num_bytes
