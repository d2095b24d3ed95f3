"""What a KV policy is: the rule that says what is kept of the keys and values along the sequence.

A policy stands between the projections of a layer and its attention. The layer that computes keys and values
asks it once per pass; every layer that reads them gets the result as tensors. A policy keeps no tensors: what
it needs later it returns. What follows from its settings alone is said by `PolicyConfig` (`config.py`).

Shapes: b batch rows, s tokens, h query heads, g KV heads (those of this rank), d channels of a head, e extra
channels and a age of the policy's `KeyBias` (0 without one)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lckv.attention.visibility import Documents
from lckv.policies.config import PolicyConfig, Reach, Traits
from lckv.rope import Turn


class KeyValue(NamedTuple):
    """What readers of a layer attend to."""

    key: Tensor
    """[s, b, g, d + e], rotated to absolute positions.
    Where the policy biases keys, the last channel is the bias."""

    value: Tensor
    """[s, b, g, d]."""


@dataclass(frozen=True)
class Statistic:
    """A number that a policy reports of every layer, row and KV head."""

    name: str
    """Under which it is logged: NAME/layer_0/head_0."""

    text: str
    """What it is, for the axis of a picture."""


Statistics = tuple[Tensor, ...]
"""What a layer's policy reports of one micro-batch: a float32 tensor [b, g] for each of
`KVPolicy.statistics`, through which the auxiliary loss is differentiated."""


@dataclass(frozen=True, eq=False)
class RowPart:
    """Rows that are parts of longer rows, which other processes have (context parallelism).

    A part has tokens of its own; in front of them and behind them are those that the policy looks at. What it
    makes of these is dropped."""

    reach: Reach
    """How many tokens are in front and behind (`Traits.reach`)."""

    begins: Tensor
    """bool [s, b]: tokens that begin a document or the whole row, and what is not in the row."""

    counted_in_row: Tensor
    """float32 [b]: tokens of the whole row that count, at least 1."""

    carried: Callable[[Tensor, Tensor], Tensor]
    """For sums S_t = p_t S_{t-1} + x_t along the whole row: from each part's product of all its own p [b, g]
    and its own last sum [b, g, n], begun at 0, to the sum [b, g, n] of the row in front of each part. All
    processes that share the row call it together."""


class Rotate(Protocol):
    """RoPE at some positions."""

    def __call__(self, heads: Tensor, *, last: Tensor | float | None = None) -> Tensor:
        """[s, b, any heads, d] to the same. With `last` [s, b, any heads] the last channel is turned as if it
        were 0, and then becomes `last`."""
        ...


def unturned(heads: Tensor, *, last: Tensor | float | None = None) -> Tensor:
    """`Rotate` by angles of 0."""
    if last is None:
        return heads
    heads = heads.clone()
    heads[..., -1] = last
    return heads


@dataclass(frozen=True, eq=False)
class TokenContext:
    """What a policy may need to know of the tokens whose keys and values it is given."""

    rotate: Rotate
    """RoPE at the tokens' positions."""

    documents: Documents | None = None
    """Document boundaries; None: every row is one document, or a part of a row. See `begins`."""

    counted: Tensor | None = None
    """bool [s, b]: tokens that are not padding; None: all. Padding is never seen and does not count."""

    noise: Tensor | None = None
    """What `KVPolicy.draw_noise` returned for this layer and micro-batch, KV heads of this rank."""

    training: bool = False
    """Whether decisions are soft and noisy."""

    progress: float = 1.0
    """Share of training that is done, 0 .. 1."""

    positions: Tensor | None = None
    """int64 [s, b]: the tokens' positions."""

    part: RowPart | None = None
    """Which parts of rows the tokens are; None: they are whole rows."""

    def begins(self, tokens: int, rows: int, device: torch.device) -> Tensor:
        """bool [s, b] for s `tokens` and b `rows`: the first token of each row and of each document."""
        if self.part is not None:
            return self.part.begins
        begins = torch.zeros(rows, tokens, dtype=torch.bool, device=device)
        begins[:, 0] = True
        if self.documents is not None:
            begins.view(-1).index_fill_(0, self.documents.cu_seqlens[:-1].long(), True)
        return begins.transpose(0, 1)

    def mean(self, numbers: Tensor) -> Tensor:
        """Mean of `numbers` [s, b, g] over the tokens of each row that count, [b, g]; 0 for a row of padding.
        Of a part of a row: what it adds to the mean of the row."""
        if self.counted is not None:
            numbers = numbers * self.counted[..., None]
        if self.part is not None:
            own = self.part.reach.own(numbers)
            return own.sum(0) / self.part.counted_in_row[:, None]
        tokens: Tensor | int = len(numbers)
        if self.counted is not None:
            tokens = self.counted.sum(0).clamp(min=1)[:, None]
        return numbers.sum(0) / tokens

    def at(self, take: Callable[[Tensor], Tensor]) -> "TokenContext":
        """Of those tokens that `take` takes of a tensor [s, b, ...], for what looks at each token alone, and
        so at no documents. `rotate` must be a `Turn`."""
        assert isinstance(self.rotate, Turn), "a rotation that cannot be cut into tokens"
        counted, noise, positions = (
            None if tensor is None else take(tensor) for tensor in (self.counted, self.noise, self.positions)
        )
        return replace(
            self,
            rotate=self.rotate.at(take),
            documents=None,
            counted=counted,
            noise=noise,
            positions=positions,
        )


class Extension(NamedTuple):
    """What new tokens add to those that an inference cache holds.

    A hidden token is dropped at age a: it is not seen by tokens that come a or more places behind it, and its
    slot is gone once such a token is in the cache. That says all of a cache's verbs. Appending: nothing is
    hidden. Replacing the newest (merging): a = 1, and the newest slot is hidden from the token that it was
    merged into. Eviction: a = 1 or more."""

    key: Tensor
    """[s, b, g, d + e] as in `KeyValue`, of the new tokens;
    the bias of a hidden one is `HIDDEN`, of others 0."""

    value: Tensor
    """[s, b, g, d]."""

    hides: Tensor | None = None
    """bool [a, b, g]: which of the a newest slots of the cache, the oldest first, are hidden. None: none."""

    state: Tensor | None = None
    """What `KVPolicy.extend` needs to know of these tokens when the next ones come: float32 [n, b, g, c], n
    and c fixed; zeros stand for no tokens. None: nothing."""


class ChannelRows(Protocol):
    """The weights (and biases) of a model's projections, seen from the channels that they make."""

    def __call__(
        self, kind: Literal["query", "first query", "key", "value"], channel: int
    ) -> Iterator[Tensor]:
        """Views of the rows that make channel `channel` of the heads of `kind`, on this rank: of every layer
        and head. "first query": of layers that compute keys and values, the first query head for each KV
        head."""
        ...


class KVPolicy(ABC):
    """A KV policy; every sharing map works with every policy. The methods here are those of a policy without
    randomness, losses and stages; a policy overrides what is different."""

    statistics: tuple[Statistic, ...] = ()
    """What `keys_values` reports, in this order."""

    per_rank: bool = False
    """Whether `auxiliary_loss` gets the means of the KV heads of each tensor-parallel rank by themselves."""

    def __init__(self, config: PolicyConfig) -> None:
        self.config = config

    @property
    def name(self) -> str:
        """As in its settings."""
        return self.config.name

    @property
    def traits(self) -> Traits:
        """As its settings say."""
        return self.config.traits

    @property
    def token_wise(self) -> bool:
        """Whether `keys_values` is a function of each token alone: it looks at no others, and reports
        nothing."""
        return self.traits.token_wise and not self.statistics

    # On tensors.

    def kernels_of_shapes(
        self, moved: Callable[[float], None]
    ) -> Iterator[tuple[object, str, Callable[..., object]]]:
        """For dry runs: functions that run as one kernel on a GPU, each as owner, name, and what takes its
        place on tensors without numbers. That tells `moved` the bytes that the kernel would move."""
        yield from ()

    def draw_noise(self, shape: Sequence[int], seeds: Sequence[int], device: torch.device) -> Tensor | None:
        """Randomness of one layer and micro-batch for `shape` [s, b, all KV heads], one seed per row.

        It depends on nothing but the seeds, so that it is the same in every pass of the plan, in
        recomputation, after a resume and in every layout. None if the policy is deterministic."""
        return None

    def query(self, query: Tensor, context: TokenContext, kv_heads: int | None = None) -> Tensor:
        """Queries [s, b, h, d] before RoPE to those that attend, [s, b, h, d + e], token by token.

        `kv_heads`: g, of a layer that computes keys and values, h / g heads for each; they are the queries
        that `keys_values` reads. None: of a layer that reads those of another."""
        return context.rotate(query)

    @abstractmethod
    def keys_values(
        self, key: Tensor, value: Tensor, read: Tensor | None, context: TokenContext
    ) -> tuple[KeyValue, Statistics]:
        """Keys and values [s, b, g, d] before RoPE to what readers attend to. `read` is what the traits say:
        queries [s, b, h, d] before RoPE, the numbers [s, b, g, 1] of the policy's projection, or None."""

    @abstractmethod
    def extend(
        self, state: Tensor | None, key: Tensor, value: Tensor, read: Tensor | None, context: TokenContext
    ) -> Extension:
        """As `keys_values` in evaluation, for tokens that follow those of a cache. `state` is that of the
        extension before; None: there are no earlier tokens."""

    # In training.

    def auxiliary_loss(self, means: Sequence[Tensor], progress: float) -> Tensor | None:
        """Loss of each row [b] from the mean of each statistic over all layers and KV heads, each [b], or
        where `per_rank` [b, ranks]; None: no loss."""
        return None

    def report(self, means: Sequence[Tensor], loss: float, progress: float | None) -> dict[str, float]:
        """Numbers to log, by name, from the mean of each statistic over rows, each float64 [layers, KV
        heads], and from the mean `loss` of rows. `progress`: share of training that is done;
        None: of an evaluation."""
        return {}

    def scripted_shift(
        self, kind: Literal["query", "key", "projection"], heads: Tensor, kv_heads: int
    ) -> Tensor | None:
        """For benchmarks, where weights are random: what to add to the heads of `kind` [s, b, heads, d]
        before RoPE (d = 1 of the policy's projection), [heads, d], so that there are as many tokens for each
        slot as the settings aim at. Layers that compute keys and values are asked; `kv_heads`: g. None:
        nothing needs to be added."""
        return None

    def obstacle_in_weights(self, rows: ChannelRows, before: PolicyConfig) -> str | None:
        """What keeps weights of a model of the policy `before` from going
        on with this one; None if nothing does."""
        return None

    def end_stage(self, rows: ChannelRows) -> str | None:
        """Change weights in place when the stage is over.
        Returns what was done, for the log; None: nothing was."""
        return None


class Reports(Protocol):
    """What has statistics: a KV policy, or another."""

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What is reported, in this order."""
        ...


def statistics_by_name(reporter: Reports, values: Sequence[Any]) -> Mapping[str, Any]:
    """One value for each statistic of `reporter`, by the statistic's name."""
    return {statistic.name: value for statistic, value in zip(reporter.statistics, values, strict=True)}
