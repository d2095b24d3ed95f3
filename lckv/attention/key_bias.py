"""Keys whose score has a bias of its own once they are old enough."""

from dataclasses import dataclass

HIDDEN = -5e4
"""Bias of a key that nobody may see. Not -inf, which would make 0 x inf in the gradient of queries."""


@dataclass(frozen=True)
class KeyBias:
    """Which keys a query sees with their bias.

    The last channel of a key is its bias. The last channel of a query is the constant that brings it to the
    score. Younger keys are seen without bias, as if their last channel were 0:

        age 2        keys     0 1 2 3 4
                     query 0  .                 .: seen without bias
                     query 1  . .               b: seen with bias
                     query 2  b . .
                     query 3  b b . .
                     query 4  b b b . .
    """

    age: int = 1
    """n >= 1: keys n or more places behind the newest one that a query sees carry their bias. (Where a layer
    hides the query's own place, the newest one is the one before, whose bias nobody can know yet.)"""

    extra_channels: int = 0
    """Channels that queries and keys have beyond those of values: 0 where the last channel of a head is free
    for the bias, else a multiple of 8, which kernels on GPUs ask for. All but the last one are 0."""

    def __post_init__(self) -> None:
        if self.age < 1:
            raise ValueError(
                f"age is {self.age}; it must be at least 1, so that every query sees a key without bias."
            )
        if self.extra_channels < 0 or self.extra_channels % 8:
            raise ValueError(
                f"extra_channels is {self.extra_channels}; it must be 0 or a multiple of 8, which kernels on "
                "GPUs ask for."
            )

    def first_biased(self, *, exclude_self: bool) -> int:
        """The smallest distance in tokens from a query to a key that carries its bias."""
        return self.age + exclude_self
