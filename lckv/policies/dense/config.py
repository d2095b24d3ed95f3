"""Settings of the dense KV policy."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lckv.policies.config import PolicyConfig, Reach, Traits

if TYPE_CHECKING:
    from lckv.policies.base import KVPolicy


@dataclass(frozen=True)
class DenseConfig(PolicyConfig):
    """Keep the keys and values of every token: the policy of a plain transformer."""

    name: Literal["dense"] = "dense"
    """Name of the KV policy."""

    @property
    def traits(self) -> Traits:
        """See `PolicyConfig`."""
        return Traits(reach=Reach())

    def build(self) -> "KVPolicy":
        """See `PolicyConfig`."""
        from lckv.policies.dense.policy import DensePolicy

        return DensePolicy(self)
