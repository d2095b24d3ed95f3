"""How much of the activations goes to the host."""

from dataclasses import dataclass


@dataclass(frozen=True)
class OffloadSettings:
    """What `train.activation_offload: token_wise` comes to on a rank."""

    share: float
    """Of the tokens: those whose activations go to the host, 0 .. 1."""

    host_bytes: int
    """The most that the host's pool takes."""
