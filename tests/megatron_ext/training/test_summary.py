"""What a run says about itself before it starts."""

from dataclasses import replace

import torch

from lckv.config import CompressionConfig
from lckv.cost import training_cost
from lckv.policies.dmc.config import DMCConfig
from megatron_ext.config import ParallelConfig, RunConfig
from megatron_ext.model.cost import model_shape
from megatron_ext.summary.sizes import RunSizes
from megatron_ext.training.summary import describe
from tests.megatron_ext.training.runs import tiny_run

LCKV = CompressionConfig(layer_types="0_2_2_3", forward_passes=7, backward_passes=2)


def summary(run: RunConfig, world_size: int = 1) -> str:
    shape = model_shape(run.model, vocab_size=128, seq_length=run.train.seq_length)
    return "\n".join(describe(RunSizes(run, shape, world_size, 12345), torch.device("cpu")))


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
        "192 bytes per token in 16 bits, 1.33x less than a plain model's 256" in text
    )  # 3 layers x 2 x 2 heads x 8 channels x 2 bytes
    assert "attention             sdpa (asked for auto: FlashAttention 3 needs CUDA" in text


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
    assert "8 processes: TP 2 + SP, PP 2, DP 2" in text
    assert "4 sequences = 2 replicas x 2 micro-batches x 1; 96 tokens per step" in text


def test_a_doubtful_map_is_warned_about_below_its_picture() -> None:
    text = summary(replace(tiny_run(), compression=replace(LCKV, layer_types="0_2_3_3")))
    picture, _, warning = text.partition(
        "\nwarning: layers 1 to 3 of 0_2_3_3 run again in every pass, and read "
    )
    assert "┐ iterated" in picture
    assert "layer 1 reads layer 2, which itself reads layer 3" in warning
    assert "warning" not in summary(replace(tiny_run(), compression=LCKV))
