"""What a run says about itself before it starts."""

from dataclasses import replace

import torch

from lckv.config import CompressionConfig
from lckv.cost import training_cost
from lckv.policies.dmc.config import DMCConfig
from megatron_ext.config import ParallelConfig, RunConfig
from megatron_ext.model.cost import model_shape
from megatron_ext.training.summary import describe, recomputed_layers
from tests.megatron_ext.training.runs import tiny_run

LCKV = CompressionConfig(layer_types="0_2_2_3", forward_passes=7, backward_passes=2)


def summary(run: RunConfig, world_size: int = 1) -> str:
    shape = model_shape(run.model, vocab_size=128, seq_length=run.train.seq_length)
    return describe(run, shape, parameters=12345, device=torch.device("cpu"), world_size=world_size)


def test_cost_and_cache_of_a_cyclic_map() -> None:
    run = replace(tiny_run(), compression=LCKV)
    text = summary(run)
    ratio = training_cost(model_shape(run.model, vocab_size=128, seq_length=24), LCKV).ratio
    assert (
        f"predicted cost        {ratio:.2f}x a plain model's step (7 passes without and 2 with gradient"
        in text
    )
    assert "12,345, keys and values computed in 3 of 4 layers" in text
    assert (
        "192 bytes per token in 16 bits, 1.33x less" in text
    )  # 3 layers x 2 x 2 heads x 8 channels x 2 bytes
    assert "attention             sdpa (asked for auto: flash-attn needs CUDA" in text


def test_merging_is_told() -> None:
    policy = DMCConfig(stage="retrofit", target_compression_ratio=4.0)
    text = summary(replace(tiny_run(), compression=CompressionConfig(policy=policy)))
    assert (
        "KV policy             dmc, stage retrofit: target 4 tokens per slot, window 12: 64 bytes per token, "
        "4.00x less than a plain model" in text
    )
    assert "KV policy" not in summary(tiny_run())


def test_layout() -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True
    )
    text = summary(replace(tiny_run(), parallel=parallel), world_size=8)
    assert "8 processes: TP 2 + SP, PP 2, DP 2; 2 micro-batches of 1 x 24 tokens" in text


def test_layers_that_run_again_in_backward() -> None:
    for granularity, count, stages, expected in [
        ("none", None, 1, 0),
        ("full", None, 2, 4),
        ("full", 1, 2, 2),
    ]:
        run = tiny_run(train={"recompute_granularity": granularity, "recompute_num_layers": count})
        run = replace(run, parallel=ParallelConfig(pipeline_model_parallel_size=stages))
        assert recomputed_layers(run) == expected
