"""How much of the activations goes to the host (MEMO, Zhao et al. 2024). Torch is not loaded.

A layer's copies to the host shall be done when the next layer's begin, and all of them shall fit there:

    whole + share x part <= seconds of the forward x rate        of each layer, per token
    sum over layers of (whole + share x part) <= host memory     of all tokens on the way to their backward

The copies back need not be looked at: a backward takes twice as long as a forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class OffloadSettings:
    """What `train.activation_offload: token_wise` comes to on a rank."""

    share: float
    """Of the tokens: those whose activations go to the host, 0 .. 1."""

    host_bytes: int
    """The most that the host's pool takes."""

    expected_bytes: int = 0
    """What it will take, as predicted."""


POOL_SHARE = 0.8
"""Of the host's pool, what tensors may fill: sizes of blocks are rounded up, and chunks are not cut without
rests."""


class LayerLoad(NamedTuple):
    """One run of a layer on one rank, per token."""

    whole: float
    """Bytes that go to the host for every token: the layer's input, the attention output."""

    part: float
    """Bytes that go there for the share of the tokens."""

    flops: float
    """Of the forward."""

    def bytes_at(self, share: float) -> float:
        """What goes to the host, averaged over tokens."""
        return self.whole + share * self.part


@dataclass(frozen=True)
class Machine:
    """What a rank has of it."""

    bytes_per_second: float
    """Copied to the host."""

    flops_per_second: float
    """Reached, not the peak."""

    host_bytes: int


def largest_share(layers: Sequence[LayerLoad], tokens: int, machine: Machine) -> float:
    """Of the tokens, 0 .. 1; `tokens`: those that are between their forward and backward at once. Host memory
    that does not even suffice for a share of 0 is not looked at."""
    return max(0.0, min(1.0, _hidden(layers, machine), share_that_fits(layers, tokens, machine.host_bytes)))


def share_that_fits(layers: Sequence[LayerLoad], tokens: int, host_bytes: int) -> float:
    """The share with which the host's memory is full; negative where the rest alone does not fit."""
    whole, part = (
        tokens * sum(column) for column in ([load.whole for load in layers], [load.part for load in layers])
    )
    return (host_bytes - whole) / part if part else float("inf" if whole <= host_bytes else "-inf")


def host_bytes(layers: Sequence[LayerLoad], tokens: int, share: float) -> int:
    """What `tokens` take on the host."""
    return round(tokens * sum(load.bytes_at(share) for load in layers))


def _hidden(layers: Sequence[LayerLoad], machine: Machine) -> float:
    """The share with which the copies of some layer take as long as its forward."""
    shares = []
    for load in layers:
        room = load.flops / machine.flops_per_second * machine.bytes_per_second - load.whole
        shares.append(room / load.part if load.part else 1.0)
    return min(shares, default=1.0)
