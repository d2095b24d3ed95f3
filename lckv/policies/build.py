"""From a policy's settings to the policy."""

from lckv.policies.base import KVPolicy
from lckv.policies.dense.config import DenseConfig
from lckv.policies.dense.policy import DensePolicy


def build_policy(config: DenseConfig) -> KVPolicy:
    """The KV policy that `compression.policy` describes."""
    policies = {DenseConfig: DensePolicy}
    return policies[type(config)]()
