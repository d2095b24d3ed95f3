"""KV policies as the command line of benchmarks names them."""

from lckv.config import CompressionConfig
from lckv.policies.config import PolicyConfig
from lckv.policies.registry import config_classes
from lckv.policies.staged_config import StagedConfig
from megatron_ext.errors import ConfigError
from megatron_ext.settings import read


def merging_policies() -> dict[str, str]:
    """All KV policies but a plain transformer's, by name as `policy_of` takes them; those with stages in the
    one in which they learn to merge or drop tokens."""
    names = [name for name in config_classes() if name != CompressionConfig().policy.name]
    return {
        name: f"{name}:stage=retrofit" if isinstance(policy_of(name), StagedConfig) else name
        for name in names
    }


def policy_of(text: str) -> PolicyConfig:
    """The KV policy that NAME or NAME:FIELD=VALUE:... describes.
    Raises ConfigError, which is a ValueError."""
    name, *settings = text.split(":")
    fields = dict(setting.partition("=")[::2] for setting in settings)
    policy = read(CompressionConfig, [("", {"policy": {"name": name, **fields}})]).policy
    if problems := [str(problem.under("policy")) for problem in policy.problems()]:
        raise ConfigError("\n".join(problems))
    return policy
