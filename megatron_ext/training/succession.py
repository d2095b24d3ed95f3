"""What may follow what in training: from the policy and stage of a checkpoint to those of a run, and the end
of a stage.

A run is resumed in the policy and stage that it was in; a new stage starts with checkpoint.finetune. What
else keeps one policy from following another, the policies say.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule

from lckv.config import CompressionConfig
from lckv.errors import SettingError
from lckv.policies.base import KVPolicy
from lckv.policies.config import PolicyConfig
from megatron_ext.checkpointing.state import finish_parameter_gather
from megatron_ext.errors import ConfigError
from megatron_ext.model.channel_rows import StageChannelRows

logger = logging.getLogger(__name__)


def policy_of(settings: Mapping[str, Any]) -> PolicyConfig:
    """The policy of a checkpoint whose run had `settings`. Raises ConfigError where it is not known here."""
    saved = (settings.get("compression") or {}).get("policy")
    try:
        return CompressionConfig.from_dict({} if saved is None else {"policy": saved}).policy
    except SettingError as error:
        raise ConfigError(f"of the checkpoint, {error.under('compression')}") from error


def check_succession(before: PolicyConfig, after: PolicyConfig, *, finetune: bool) -> None:
    """ConfigError where a checkpoint of the policy `before` cannot go on as `after`."""
    obstacle = before.obstacle_to_leaving(after)
    if obstacle is None and not finetune and (before.name, before.stage) != (after.name, after.stage):
        obstacle = "To start the next stage from its weights, set checkpoint.finetune to true"
        raise ConfigError(f"{_contrast(before, after)}. {obstacle}.")
    if obstacle is not None:
        raise ConfigError(f"{_contrast(before, after)}: {obstacle}.")


def check_weights(model: MegatronModule, policy: KVPolicy, before: PolicyConfig) -> None:
    """ConfigError, on every rank, where weights that some rank has loaded keep `policy`
    from following `before`."""
    obstacle = policy.obstacle_in_weights(StageChannelRows(model), before)
    of_ranks: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, obstacle)
    for obstacle in of_ranks:
        if obstacle is not None:
            raise ConfigError(f"{_contrast(before, policy.config)}: {obstacle}.")


def end_stage(model: MegatronModule, optimizer: MegatronOptimizer, policy: KVPolicy) -> None:
    """What `policy` does to weights when training is over."""
    finish_parameter_gather([model])
    done = policy.end_stage(StageChannelRows(model))
    if done is not None:
        optimizer.reload_model_params()
        logger.info(done)


def _contrast(before: PolicyConfig, after: PolicyConfig) -> str:
    return f"compression.policy is {_shown(after)}, but the checkpoint's is {_shown(before)}"


def _shown(policy: PolicyConfig) -> str:
    return policy.name if policy.stage is None else f"{policy.name}, stage {policy.stage}"
