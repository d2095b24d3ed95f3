"""Where the tokens of a layer lie in its tensors, and which of them go to the host."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Split:
    """A tensor whose first dimension is shards x rows; the first `head` rows of each shard go to the host.

    With sequence parallelism a gathered tensor holds the shards of the ranks one after the other:

        rank 0: head tail | rank 1: head tail        for shards = 2
    """

    shards: int
    rows: int
    head: int

    def head_of(self, tensor: Tensor) -> Tensor:
        """View [shards, head, ...] of a tensor [shards * rows, ...]."""
        return tensor.unflatten(0, (self.shards, self.rows))[:, : self.head]

    def tail_of(self, tensor: Tensor) -> Tensor:
        """View [shards, rows - head, ...] of a tensor [shards * rows, ...]."""
        return tensor.unflatten(0, (self.shards, self.rows))[:, self.head :]


@dataclass(frozen=True)
class Tokens:
    """Those that one call of a layer gets on this rank."""

    count: int
    """s: tokens of a row on this rank, s of the sequence / shards."""

    batch: int
    """b: rows."""

    shards: int
    """Ranks that share a sequence out (sequence parallelism), else 1."""

    head: int
    """The first tokens of this rank that go to the host, 0 .. count; the others are computed again."""

    @classmethod
    def of(cls, hidden_states: Tensor, *, shards: int, share: float) -> "Tokens":
        """Of a layer's input [s, b, hidden], of which the first `share` goes to the host."""
        count, batch = hidden_states.shape[:2]
        return cls(count, batch, shards, min(count, round(count * share)))

    @property
    def all_on_host(self) -> bool:
        """Whether nothing is computed again."""
        return self.head == self.count

    def split(self, shape: Sequence[int]) -> Split | None:
        """Of a tensor [s, b, ...], [s * b, ...], or the same of all shards; None if it is none of these."""
        for shards in (1, self.shards):
            if len(shape) > 1 and tuple(shape[:2]) == (shards * self.count, self.batch):
                return Split(shards, self.count, self.head)
        for shards in (1, self.shards):
            if len(shape) > 0 and shape[0] == shards * self.count * self.batch:
                return Split(shards, self.count * self.batch, self.head * self.batch)
        return None

    def tail(self, tensor: Tensor) -> Tensor:
        """The tokens that are computed again, of a tensor that `split` knows."""
        split = self.split(tensor.shape)
        assert split is not None, f"a tensor of shape {list(tensor.shape)} has no tokens {self}"
        return split.tail_of(tensor).flatten(0, 1)
