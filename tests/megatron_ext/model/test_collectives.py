"""What tensor parallelism sends: as much as the products of matrices need, and nothing for what a pass of the
plan leaves out."""

from collections import Counter
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lckv.config import CompressionConfig
from megatron_ext.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_ext.model.build import build_stage
from megatron_ext.parallel.process_groups import initialize
from tests.ranks import run_on_ranks

MODEL = ModelConfig(num_layers=5, hidden_size=32, num_attention_heads=4, vocab_size=64)
KINDS = {"allreduce": "all-reduce", "allgather": "gather", "reduce_scatter": "scatter"}
PLAIN, CYCLIC = CompressionConfig(), partial(CompressionConfig, layer_types="0_3_3_3_4")
AROUND = 1
"""All-reduces of the embedding."""
LOSS = {"gather": 1}
"""Of each chunk of the loss: the largest logit, the sum and the target's, together."""


def _sent(parallel: ParallelConfig, compression: CompressionConfig) -> tuple[Counter[str], Counter[str]]:
    """Collectives of a forward, and of a backward."""
    initialize(parallel, seed=1)
    train = TrainConfig(seq_length=16, micro_batch_size=1, precision="fp32")
    model = build_stage(MODEL, compression, parallel, train, vocab_size=64)
    tokens = torch.arange(16)[None]
    losses: list[Tensor] = []
    forward = _counted(lambda: losses.append(model(tokens, tokens, tokens)[0].total))
    return forward, _counted(losses[0].backward)


def _counted(function: object) -> Counter[str]:
    dist.barrier()
    with torch.profiler.profile() as profile:
        function()  # type: ignore[operator]
    found: Counter[str] = Counter()
    for event in profile.key_averages():
        kind = next(
            (KINDS[name] for name in KINDS if event.key.startswith("c10d::") and name in event.key), None
        )
        if kind is not None:
            found[kind] += event.count
    return found


def sent(compression: CompressionConfig, *, sequence_parallel: bool) -> tuple[Counter[str], Counter[str]]:
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    return run_on_ranks(2, _sent, parallel, compression)[0]


@pytest.mark.parametrize("passes", [(1, 1), (3, 1), (2, 2)], ids=str)
def test_a_pass_sends_for_whole_layers_alone(passes: tuple[int, int]) -> None:
    """Two all-reduces of a whole layer, one where attention is left out (the first pass has no keys and
    values yet), none for keys and values that a pass without gradient ends with. Layers 1 to 3 iterate."""
    without, with_gradient = passes
    forward, backward = sent(
        CYCLIC(forward_passes=without, backward_passes=with_gradient), sequence_parallel=False
    )
    outside, first, further, last = 2 * 2, 2 * 1, 2 * 2, 2 * 3
    kept = with_gradient - 1  # passes with gradient that only serve the next one
    assert forward == {
        "all-reduce": AROUND + outside + first + (without - 1 + kept) * further + last,
        **LOSS,
    }
    keys_alone = 1  # the gradient of what keys and values are made of, summed over their heads
    assert backward == {"all-reduce": 1 + outside + last + kept * (further + keys_alone)}


def test_sequence_parallel_passes_gather_once_for_each_product() -> None:
    """Four of a whole layer. One of them could be spared in each pass: the group's lowest layer projects the
    queries of the same states every time (docs/negative_results.md)."""
    more, fewer = (
        sent(CYCLIC(forward_passes=passes, backward_passes=1), sequence_parallel=True) for passes in (3, 2)
    )
    assert more[0] - fewer[0] == {"gather": 2 * 2 + 1, "scatter": 2 * 2}
    assert more[1] == fewer[1], "passes without gradient have no backward"


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_map_that_does_not_iterate_sends_what_a_plain_model_does(sequence_parallel: bool) -> None:
    shared = CompressionConfig(layer_types="0_0_0_3_3")
    assert sent(shared, sequence_parallel=sequence_parallel) == sent(
        PLAIN, sequence_parallel=sequence_parallel
    )
