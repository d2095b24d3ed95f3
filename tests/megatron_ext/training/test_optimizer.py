"""On a CPU the optimizer goes over its numbers once, and one rank sends nothing to itself."""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import repeat

import pytest
import torch
from torch import Tensor

from lckv.config import CompressionConfig
from megatron_ext.config import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_ext.data.batch import make_batch
from megatron_ext.model.build import build_stage, wrap
from megatron_ext.parallel.lone import LoneDataParallel
from megatron_ext.parallel.process_groups import chunks_of_rank, device_of_rank, initialize
from megatron_ext.training.optimizer import build_optimizer
from megatron_ext.training.step import train_step
from tests.ranks import run_on_ranks

MODEL = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=64)
COLLECTIVES = ("gather", "reduce_scatter", "_base")


def _steps(
    parallel: ParallelConfig, *, alone: bool, fused: bool
) -> tuple[list[Tensor], set[str], list[object]]:
    """The weights after three steps, the operations of a fourth, and what the optimizer's groups say."""
    initialize(parallel, seed=1)
    train = TrainConfig(
        seq_length=16, micro_batch_size=1, global_batch_size=2, train_iters=9, precision="fp32"
    )
    model = wrap(build_stage(MODEL, CompressionConfig(), parallel, train, vocab_size=64), parallel, train)
    assert isinstance(model, LoneDataParallel) == (not parallel.overlap_grad_reduce)
    if not alone:
        for name in ("start_param_sync", "start_grad_sync", "finish_grad_sync"):
            method = getattr(super(LoneDataParallel, model), name)
            setattr(model, name, method)
    optimizer, scheduler = build_optimizer(OptimizerConfig(lr=1e-2, clip_grad=0.1), parallel, train, model)
    adam = (
        optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer.chained_optimizers[0].optimizer
    )
    if not fused:
        adam._optimizer_step_pre_hooks.clear()
    batch = partial(
        make_batch, data=DataConfig(), eod=None, device=device_of_rank(), chunks=chunks_of_rank(), reach=0
    )
    step = partial(train_step, model, optimizer, scheduler, _samples(), batch, train, progress=0.5)
    for _ in range(3):
        step()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.profiler.profile() as profile:
        step()
    operations = {event.key for event in profile.key_averages()}
    return weights, operations, [group["fused"] for group in adam.param_groups]


def _samples() -> Iterator[Mapping[str, Tensor]]:
    text = torch.randint(64, (1, 17), generator=torch.Generator().manual_seed(1))
    return repeat(
        {"tokens": text[:, :-1], "labels": text[:, 1:], "sample_ids": torch.zeros(1, dtype=torch.int64)}
    )


def _sent(operations: set[str]) -> set[str]:
    return {name for name in operations if "c10d" in name and any(kind in name for kind in COLLECTIVES)}


def test_a_lone_rank_steps_without_sending_weights_or_gradients_to_itself() -> None:
    weights, operations, _ = run_on_ranks(1, partial(_steps, alone=True, fused=True), ParallelConfig())[0]
    others, with_collectives, _ = run_on_ranks(1, partial(_steps, alone=False, fused=True), ParallelConfig())[
        0
    ]
    assert _sent(operations) == set() and _sent(with_collectives)
    assert all(map(torch.equal, weights, others))


def test_adam_is_fused_while_it_steps_and_checkpoints_do_not_know() -> None:
    weights, operations, groups = run_on_ranks(1, partial(_steps, alone=True, fused=True), ParallelConfig())[
        0
    ]
    others, unfused, _ = run_on_ranks(1, partial(_steps, alone=True, fused=False), ParallelConfig())[0]
    assert "aten::_fused_adamw_" in operations and "aten::_fused_adamw_" not in unfused
    assert set(groups) == {None}
    for weight, other in zip(weights, others, strict=True):  # sums in another order: the last bits differ
        torch.testing.assert_close(weight, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("overlap", [True])
def test_what_overlaps_is_reduced_as_megatron_does(overlap: bool) -> None:
    parallel = ParallelConfig(overlap_grad_reduce=overlap)
    weights, _, _ = run_on_ranks(1, partial(_steps, alone=True, fused=True), parallel)[0]
    others, _, _ = run_on_ranks(1, partial(_steps, alone=True, fused=True), ParallelConfig())[0]
    assert all(map(torch.equal, weights, others))
