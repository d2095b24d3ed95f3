"""From a policy's settings to the policy."""

from lckv.policies.base import KVPolicy
from lckv.policies.dense.config import DenseConfig
from lckv.policies.dense.policy import DensePolicy
from lckv.policies.dmc.config import DMCConfig
from lckv.policies.dmc.policy import DMCPolicy


def build_policy(config: DenseConfig | DMCConfig) -> KVPolicy:
    """The KV policy that `compression.policy` describes."""
    if isinstance(config, DMCConfig):
        return DMCPolicy(config)
    return DensePolicy()
