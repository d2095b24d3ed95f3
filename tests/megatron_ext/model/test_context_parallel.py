"""Context parallelism changes no number: losses and gradients are those of whole rows."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor

from lckv.config import CompressionConfig
from megatron_ext.config import DataConfig, ParallelConfig, TrainConfig
from megatron_ext.data.batch import Batch, make_batch
from megatron_ext.model.build import wrap
from megatron_ext.model.gpt import SharedKVGPTModel
from megatron_ext.model.initialization import global_parameters, shard
from megatron_ext.parallel.process_groups import chunks_of_rank
from megatron_ext.schedule.micro_batches import mean_loss, run_schedule
from megatron_ext.schedule.statistics_meter import StatisticsMeter
from tests.megatron_ext.model.stages import EVERY_MAP, MERGING, VOCAB, make_stage
from tests.ranks import run_on_ranks

ROWS, TOKENS, EOD = 4, 32, 7
MAPS = {
    **EVERY_MAP,
    "dmc without window": CompressionConfig(policy=replace(MERGING, window=None)),
}


@dataclass(frozen=True)
class Case:
    """A step of ROWS rows."""

    name: str
    """Of the map."""
    documents: bool = False
    cp: int = 1
    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"
    backend: str = "reference"
    micro_batch_size: int = 2

    @property
    def alone(self) -> "Case":
        """The same on one process."""
        return Case(self.name, self.documents)

    def __str__(self) -> str:
        words = [self.name.replace(" ", "-"), f"cp{self.cp}", f"tp{self.tp}", f"pp{self.pp}"]
        words += ["documents"] * self.documents + ["sp"] * self.sequence_parallel
        return "-".join([*words, self.recompute, self.backend])


@dataclass(frozen=True)
class Step:
    """What one rank has of a step."""

    loss: float
    gradients: dict[str, Tensor]
    """By name."""
    statistics: list[float]
    """The loss of the KV policy, and the mean of its statistic for each layer and head."""


CASES = [
    *(Case(name, documents=True, cp=2) for name in MAPS),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_depends_on_context_parallelism(case: Case) -> None:
    whole = alone(case.alone)
    for loss, worst, statistics in run_on_ranks(case.cp * case.tp * case.pp, compare, case, whole.gradients):
        assert loss == pytest.approx(whole.loss, rel=2e-6)
        assert statistics == pytest.approx(whole.statistics, rel=1e-5, abs=1e-7)
        assert worst[0] < 2e-5, worst


@cache
def alone(case: Case) -> Step:
    (step,) = run_on_ranks(1, step_of, case)
    return step


def step_of(case: Case) -> Step:
    """On every rank."""
    _, step = run(case)
    return step


def compare(case: Case, whole: dict[str, Tensor]) -> tuple[float, tuple[float, str], list[float]]:
    """On every rank: loss, largest difference of a gradient relative to its largest number, statistics."""
    stage, step = run(case)
    differences = []
    for name, gradient in step.gradients.items():
        expected = shard(stage, name, whole[name])
        difference = (gradient - expected).abs().max() / whole[name].abs().max()
        differences.append((difference.item(), name))
    return step.loss, max(differences), step.statistics


def run(case: Case) -> tuple[SharedKVGPTModel, Step]:
    parallel = ParallelConfig(
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        context_parallel_size=case.cp,
        sequence_parallel=case.sequence_parallel,
        use_distributed_optimizer=False,
    )
    train = TrainConfig(
        micro_batch_size=case.micro_batch_size,
        global_batch_size=ROWS,
        seq_length=TOKENS,
        precision="fp32",
        recompute_granularity=case.recompute,
    )
    stage = make_stage(MAPS[case.name], parallel, train, attention_backend=case.backend)
    model = wrap(stage, parallel, train)
    meter = StatisticsMeter(model)
    batches = iter(batches_of(case))
    losses = run_schedule(model, batches, lambda batch: batch, train, meter, progress=0.5, forward_only=False)
    loss, _ = mean_loss(losses)
    gradients = {name: parameter.main_grad.clone() for name, parameter in global_parameters(stage)}
    means = meter.total()
    statistics = [] if means is None else [means.auxiliary_loss, *means.by_head().values()]
    return stage, Step(loss, gradients, statistics)


def batches_of(case: Case) -> Iterator[Batch]:
    """Those of this rank; rows have documents, and some have padding at their ends."""
    text = torch.randint(VOCAB, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(3))
    data = DataConfig()
    if case.documents:
        text[torch.rand(text.shape, generator=torch.Generator().manual_seed(4)) < 0.1] = EOD
        text[0, 20:] = -1
        text[1, 9:14] = EOD
        data = DataConfig(reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
    for start in range(0, ROWS, case.micro_batch_size):
        rows = text[start : start + case.micro_batch_size]
        samples = {
            "tokens": rows[:, :-1],
            "labels": rows[:, 1:],
            "sample_ids": torch.arange(start, start + len(rows)),
        }
        reach = MAPS[case.name].policy.traits.reach
        yield make_batch(samples, data, EOD, "cpu", chunks_of_rank(), reach)
