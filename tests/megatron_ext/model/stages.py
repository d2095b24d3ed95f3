"""Small stages for tests of the model."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lckv.config import CompressionConfig
from lckv.policies.dmc.config import DMCConfig
from lckv.policies.dms.config import DMSConfig
from megatron_ext.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_ext.model.build import build_stage
from megatron_ext.model.gpt import SharedKVGPTModel
from megatron_ext.model.initialization import global_parameters, shard
from megatron_ext.parallel.process_groups import initialize

MODEL = ModelConfig(
    num_layers=6,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=64,
    init_method_std=0.2,
)
VOCAB = 61
MAPS = {
    "plain": CompressionConfig(),
    "cla": CompressionConfig(layer_types="0_0_2_2_4_4"),
    "mlkv": CompressionConfig(layer_types="0_0_0_3_3_3"),
    "yoco": CompressionConfig(layer_types="0s_1s_2s_3_3_3", sliding_window=5),
    "mix": CompressionConfig(layer_types="0_1s_0_3s_3s_0", sliding_window=4),
    "lckv": CompressionConfig(layer_types="0_4_4_4_4_5", forward_passes=2, backward_passes=2),
    "sandwich": CompressionConfig(layer_types="0_3_3_3_3_5", forward_passes=2, backward_passes=1),
    "groups": CompressionConfig(layer_types="1_1_3_3_5_5", forward_passes=1, backward_passes=2),
    "chain": CompressionConfig(layer_types="0_2_4_2_4_5", forward_passes=2, backward_passes=2),
    "down and up": CompressionConfig(
        layer_types="1_2s_0_3_4_5", sliding_window=6, forward_passes=0, backward_passes=1
    ),
    "nodiag": CompressionConfig(
        layer_types="0_4_4_4_4_5", forward_passes=0, backward_passes=3, force_nodiag=True
    ),
    "mixed": CompressionConfig(layer_types="0_1+0s_0_3+1_3_5+0", sliding_window=5),
    "two sources": CompressionConfig(layer_types="0_1_1/0_4_1+0_4/1", forward_passes=1, backward_passes=2),
}
"""One of every kind."""

MERGING = DMCConfig(stage="finetune", initial_decision_bias=0.3, temperature=0.5, window=4)
"""Merges with initial weights already."""
MERGED_MAPS = {
    "dmc": CompressionConfig(policy=MERGING),
    "cla x dmc": CompressionConfig(layer_types="0_0_2_2_4_4", policy=MERGING),
    "yoco x dmc": CompressionConfig(layer_types="0_1_2_3_3_3", policy=MERGING),
    "lckv x dmc": CompressionConfig(
        layer_types="0_4_4_4_4_5", forward_passes=2, backward_passes=2, policy=MERGING
    ),
    "groups x dmc": CompressionConfig(
        layer_types="1_1_3_3_5_5", forward_passes=1, backward_passes=1, policy=MERGING
    ),
    "mixed lckv x dmc": CompressionConfig(
        layer_types="0_1+0_4_3+0_4+3_5+4", forward_passes=1, backward_passes=2, policy=MERGING
    ),
}
EVERY_MAP = {**MAPS, **MERGED_MAPS}

ADAPTED = DMSConfig(
    stage="finetune",
    decision_source="adapter",
    target_compression_ratio=4.0,
    decision_scale=3.0,
    initial_decision_offset=0.3,
    temperature=0.5,
    window=3,
)
"""Has parameters of its own."""
ADAPTED_MAPS = {
    "adapter": CompressionConfig(layer_types="0_1_2_3_3_3", policy=ADAPTED),
    "lckv x adapter": CompressionConfig(
        layer_types="0_4_4_4_4_5", forward_passes=2, backward_passes=2, policy=ADAPTED
    ),
    "adapter of layers": CompressionConfig(policy=replace(ADAPTED, decisions_per="layer")),
}


def make_stage(
    compression: CompressionConfig,
    parallel: ParallelConfig | None = None,
    train: TrainConfig | None = None,
    **model: Any,
) -> SharedKVGPTModel:
    """The stage of this rank, float32 unless `train` says otherwise; initialises process groups."""
    parallel = parallel or ParallelConfig()
    initialize(parallel, seed=1)
    train = train or TrainConfig(precision="fp32")
    stage = build_stage(replace(MODEL, **model), compression, parallel, train, vocab_size=VOCAB)
    fill_mixes(stage)
    fill_projections(stage)
    return stage


@torch.no_grad()
def fill_projections(stage: SharedKVGPTModel) -> None:
    """Numbers in the weights of a KV policy's own, which begin at zero."""
    for name, parameter in global_parameters(stage):
        if ".dms_proj_alpha." in name:
            generator = torch.Generator().manual_seed(int(name.split(".")[2]))
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def fill_mixes(stage: SharedKVGPTModel) -> None:
    """Numbers in the weights that mix keys and values, which begin as if nothing were mixed in."""
    for name, parameter in stage.named_parameters():
        if name.endswith((".key_weight", ".value_weight")):
            parameter.copy_(torch.tensor([0.5, 0.8] if "key" in name else [-0.6, 1.1]) / 35)


GUESSING = {
    "guess": CompressionConfig(
        layer_types="0_4_4_4_4_5",
        forward_passes=1,
        backward_passes=2,
        first_guess=True,
        first_guess_loss_coefficient=0.5,
        agreement_loss_coefficient=0.25,
    ),
    "guess alone": CompressionConfig(
        layer_types="0_4_4_4_4_5", forward_passes=0, backward_passes=1, first_guess=True
    ),
    "guess in two groups": CompressionConfig(
        layer_types="1_1_2_4_4_5", forward_passes=1, backward_passes=1, first_guess=True
    ),
    "agreement": CompressionConfig(
        layer_types="0_4_4_4_4_5", forward_passes=1, backward_passes=1, agreement_loss_coefficient=2.0
    ),
}


@torch.no_grad()
def fill_guesses(stage: SharedKVGPTModel) -> None:
    """Numbers in the weights of first guesses, which begin at zero; the same in every layout."""
    for name, parameter in global_parameters(stage):
        if name.endswith("linear_first_guess.weight"):
            heads = stage.config.num_query_groups * stage.config.kv_channels
            generator = torch.Generator().manual_seed(int(name.split(".")[2]))
            whole = torch.randn(2 * heads, stage.config.hidden_size, generator=generator)
            parameter.copy_(shard(stage, name, 0.2 * whole))


def draw_tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def positions_of(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1]).expand_as(tokens)
