"""Settings of a KV policy that exists only here: whatever it needs of the product must be there for any
policy."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Literal

from lckv.attention.key_bias import KeyBias
from lckv.errors import Problem
from lckv.policies.config import PolicyConfig, Reach, Traits

if TYPE_CHECKING:
    from lckv.policies.base import KVPolicy


@dataclass(frozen=True)
class ForgetfulConfig(PolicyConfig):
    """Forget all but every n-th token once they are old."""

    name: Literal["forgetful"] = "forgetful"
    """Name of the KV policy."""

    age: int = 4
    """Tokens after which a token is forgotten."""

    stride: int = 2
    """n: tokens at positions that are multiples of it stay."""

    loss_weight: float = 0.1
    """Of the mean square of keys."""

    @property
    def traits(self) -> Traits:
        """See `PolicyConfig`. No channel of a head is free for the bias."""
        return Traits(KeyBias(max(1, self.age), extra_channels=8), windows=False, reach=Reach())

    def build(self) -> "KVPolicy":
        """See `PolicyConfig`."""
        from tests.policies.forgetful.policy import ForgetfulPolicy

        return ForgetfulPolicy(self)

    def problems(self) -> Iterator[Problem]:
        """See `PolicyConfig`."""
        if self.age < 1:
            yield Problem("age", self.age, "it must be at least 1 token")
        if self.stride < 1:
            yield Problem("stride", self.stride, "it must be at least 1")

    @property
    def compression_ratio(self) -> float:
        """See `PolicyConfig`."""
        return float(self.stride)

    def slots(self, tokens: int, compression_ratio: float) -> int:
        """The newest ones, and every n-th of those before."""
        return min(tokens, self.age) + ceil(max(0, tokens - self.age) / compression_ratio)

    def state_numbers(self, head_dim: int) -> int:
        """Whether each of the newest tokens is to be forgotten."""
        return self.age

    def describe(self) -> str:
        """See `PolicyConfig`."""
        return f"forgetful: every {self.stride}th token stays beyond {self.age} tokens"

    def card(self) -> str:
        """See `PolicyConfig`."""
        return f"Beyond {self.age} tokens only every {self.stride}th token is kept."

    @property
    def references(self) -> tuple[str, ...]:
        """See `PolicyConfig`."""
        return ("Nobody. *On forgetting.* Never published.",)
