"""The stages of DMC in a training run: what may follow what, and the end of stage zero_out."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from lckv.policies.dense.config import DenseConfig
from lckv.policies.dmc.config import DMCConfig
from lckv.policies.dmc.schedule import decision_rows, fused_decision_rows
from megatron_ext.checkpointing.state import finish_parameter_gather
from megatron_ext.errors import ConfigError
from megatron_ext.model.attention import SharedKVAttention

logger = logging.getLogger(__name__)

_MERGING = ("retrofit", "finetune")


def check_succession(saved: Mapping[str, Any], policy: DenseConfig | DMCConfig, *, finetune: bool) -> None:
    """ConfigError where a checkpoint of the policy `saved` (its settings) cannot go on as `policy`.

    A model that merges is not the same function without merging; and a run is resumed in the stage that it
    was in (a new stage starts with checkpoint.finetune).
    """
    stage, before = getattr(policy, "stage", None), saved.get("stage")
    shown = f"compression.policy is {policy.name}{f', stage {stage}' if stage else ''}"
    was = f"the checkpoint's is {saved.get('name', 'dense')}{f', stage {before}' if before else ''}"
    if before in _MERGING and stage not in _MERGING:
        raise ConfigError(
            f"{shown}, but {was}: its decision channel now decides what is merged. Set "
            "compression.policy.name to dmc and "
            "compression.policy.stage to retrofit or finetune, or load an earlier checkpoint."
        )
    if not finetune and stage != before:
        raise ConfigError(
            f"{shown}, but {was}. To start the next stage from its weights, set checkpoint.finetune to true."
        )


def check_decision_channel(
    model: MegatronModule, policy: DenseConfig | DMCConfig, saved: Mapping[str, Any]
) -> None:
    """ConfigError where stage retrofit or finetune starts from weights of a model whose decision channel was
    never zeroed."""
    if getattr(policy, "stage", None) not in _MERGING or saved.get("stage") in _MERGING:
        return
    largest = max((rows.abs().max().item() for rows in _decision_weights(model)), default=0.0)
    if largest > 0:
        raise ConfigError(
            f"compression.policy.stage is {getattr(policy, 'stage', None)}, but the loaded weights use the "
            "decision channel (the last one "
            f"of queries and keys; its largest weight is {largest:.3g}), so decisions would be arbitrary. "
            "Run stage zero_out first, to its "
            "end, and load what it saves."
        )


@torch.no_grad()
def zero_decision_channel(model: MegatronModule, optimizer: MegatronOptimizer) -> None:
    """The end of stage zero_out: weights (and biases) of the last channel of every query and key head become
    0, which by then changes no output."""
    finish_parameter_gather([model])
    for rows in _decision_weights(model):
        rows.zero_()
    optimizer.reload_model_params()
    logger.info("stage zero_out is over: the decision channel of all queries and keys is 0")


def _decision_weights(model: MegatronModule) -> Iterator[Tensor]:
    """Views of the rows of the decision channel on this rank."""
    for layer in get_attr_wrapped_model(model, "decoder").layers:
        attention: SharedKVAttention = layer.self_attention
        projection = attention.linear_qkv if attention.computes_kv else attention.linear_q
        for parameter in (projection.weight, projection.bias):
            if parameter is not None:
                for row in _rows_of_rank(attention):
                    yield parameter.data[row]


def _rows_of_rank(attention: SharedKVAttention) -> list[int]:
    """Rows of the decision channel in this rank's part of the layer's projection. Ranks split the rows
    evenly, also those of one KV head where there are more ranks than KV heads."""
    config, ranks, rank = attention.config, attention.world_size, attention.pg_collection.tp.rank()
    if attention.computes_kv:
        rows = fused_decision_rows(config.num_attention_heads, config.num_query_groups, attention.head_dim)
        size = (config.num_attention_heads + 2 * config.num_query_groups) * attention.head_dim // ranks
    else:
        rows = decision_rows(config.num_attention_heads, attention.head_dim)
        size = config.num_attention_heads * attention.head_dim // ranks
    return [row - rank * size for row in rows if rank * size <= row < (rank + 1) * size]
