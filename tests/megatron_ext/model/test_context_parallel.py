"""Context parallelism changes no number: losses and gradients are those of whole rows."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lckv.config import CompressionConfig
from lckv_megatron.dry_run.collectives import kind_of
from megatron_ext.config import DataConfig, ParallelConfig, TrainConfig
from megatron_ext.data.batch import Batch, make_batch
from megatron_ext.model.build import wrap
from megatron_ext.model.gpt import SharedKVGPTModel
from megatron_ext.model.initialization import global_parameters, shard
from megatron_ext.model.policy_statistics import PolicyInputs
from megatron_ext.parallel.process_groups import chunks_of_rank
from megatron_ext.schedule.micro_batches import mean_loss, run_schedule
from megatron_ext.schedule.statistics_meter import StatisticsMeter
from tests.megatron_ext.model.stages import (
    ADAPTED_MAPS,
    EVERY_MAP,
    GUESSING,
    MERGING,
    VOCAB,
    fill_guesses,
    make_stage,
)
from tests.ranks import run_on_ranks

ROWS, TOKENS, EOD = 4, 32, 7
MAPS = {
    **EVERY_MAP,
    **GUESSING,
    **ADAPTED_MAPS,
    "dmc without window": CompressionConfig(policy=replace(MERGING, window=None)),
    "plain nodiag": CompressionConfig(force_nodiag=True),
    "mixed plain": CompressionConfig(layer_types="0_1+0_2+1_3_4+1_5+0"),
}


@dataclass(frozen=True)
class Case:
    """A step of ROWS rows."""

    name: str
    """Of the map."""
    documents: Literal["", "documents", "of a token each"] = ""
    cp: int = 1
    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"
    backend: str = "sdpa"
    micro_batch_size: int = 2
    communication: Literal["gather", "ring"] = "gather"

    @property
    def alone(self) -> "Case":
        """The same on one process."""
        return Case(self.name, self.documents)

    def __str__(self) -> str:
        words = [self.name.replace(" ", "-"), f"cp{self.cp}", f"tp{self.tp}", f"pp{self.pp}"]
        words += [self.documents.replace(" ", "-")] * bool(self.documents) + ["sp"] * self.sequence_parallel
        return "-".join([*words, self.recompute, self.backend] + ["ring"] * (self.communication == "ring"))


@dataclass(frozen=True)
class Step:
    """What one rank has of a step."""

    loss: float
    gradients: dict[str, Tensor]
    """By name."""
    statistics: list[float]
    """The loss of the KV policy, and the mean of its statistic for each layer and head."""


TWO_RANKS = (
    "plain", "yoco", "mix", "lckv", "chain", "down and up", "nodiag", "dmc", "yoco x dmc", "lckv x dmc",
    "dmc without window",
)  # fmt: skip
CASES = [
    *(Case(name, documents="documents", cp=2) for name in TWO_RANKS),
    *(Case(name, cp=4) for name in ("down and up", "lckv", "lckv x dmc", "dmc without window")),
    Case("lckv", documents="documents", cp=2, backend="reference", recompute="selective"),
    Case("dmc without window", documents="documents", cp=2, recompute="full"),
    Case("yoco", documents="documents", cp=2, tp=2, sequence_parallel=True),
    Case("lckv", cp=2, tp=2),
    Case("dmc", documents="documents", cp=2, tp=2, sequence_parallel=True, recompute="selective"),
    *(Case(name, "of a token each", cp=2) for name in ("nodiag", "lckv x dmc")),
    Case("mix", cp=2, pp=2),
    Case("yoco x dmc", documents="documents", cp=2, pp=2, micro_batch_size=1),
    Case("chain", documents="documents", cp=2, pp=2, micro_batch_size=1),
    Case("lckv x dmc", cp=2, pp=2, recompute="full"),
    Case("mixed", documents="documents", cp=2, pp=2, micro_batch_size=1),
    Case("mixed", documents="documents", tp=2, recompute="full"),
    Case("mixed plain", cp=2, communication="ring"),
    Case("two sources", documents="documents", cp=2, pp=2, recompute="full"),
    Case("two sources", tp=2, pp=2, sequence_parallel=True, micro_batch_size=1),
    Case("mixed lckv x dmc", documents="documents", cp=2, pp=2, recompute="full"),
    Case("mixed lckv x dmc", tp=2, pp=2, sequence_parallel=True, micro_batch_size=1),
    Case("adapter", documents="documents", cp=2, tp=2, sequence_parallel=True),
    Case("adapter", documents="documents", tp=4, recompute="full"),
    Case("lckv x adapter", tp=2, pp=2, sequence_parallel=True, recompute="full", micro_batch_size=1),
    Case("adapter of layers", tp=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_depends_on_context_parallelism(case: Case) -> None:
    require_the_same(case)


def require_the_same(case: Case) -> None:
    """Losses, gradients and statistics of every rank are those of one process."""
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
    parallel, train = settings_of(case)
    stage = make_stage(MAPS[case.name], parallel, train, attention_backend=case.backend)
    fill_guesses(stage)
    model = wrap(stage, parallel, train)
    meter = StatisticsMeter(model)
    batches = iter(batches_of(case))
    losses = run_schedule(model, batches, lambda batch: batch, train, meter, progress=0.5, forward_only=False)
    loss = mean_loss(losses).cross_entropy
    gradients = {name: parameter.main_grad.clone() for name, parameter in global_parameters(stage)}
    means = meter.total()
    statistics = [] if means is None else [means.auxiliary_loss, *means.by_head().values()]
    return stage, Step(loss, gradients, statistics)


def settings_of(case: Case) -> tuple[ParallelConfig, TrainConfig]:
    parallel = ParallelConfig(
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        context_parallel_size=case.cp,
        context_parallel_communication=case.communication,
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
    return parallel, train


def batches_of(case: Case) -> Iterator[Batch]:
    """Those of this rank; rows have documents, and some have padding at their ends."""
    text = torch.randint(VOCAB, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(3))
    data = DataConfig()
    if case.documents == "of a token each":  # those of the first rank
        text[:, : TOKENS // 4] = text[:, 3 * TOKENS // 4 - 1 :] = EOD
    if case.documents == "documents":
        text[torch.rand(text.shape, generator=torch.Generator().manual_seed(4)) < 0.1] = EOD
        text[0, 20:] = -1
        text[1, 9:14] = EOD
    if case.documents:
        data = DataConfig(
            reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=case.documents == "documents"
        )
    for start in range(0, ROWS, case.micro_batch_size):
        rows = text[start : start + case.micro_batch_size]
        samples = {
            "tokens": rows[:, :-1],
            "labels": rows[:, 1:],
            "sample_ids": torch.arange(start, start + len(rows)),
        }
        reach = MAPS[case.name].policy.traits.reach
        yield make_batch(samples, data, EOD, "cpu", chunks_of_rank(), reach)


OWNERS = {"plain": 6, "cla": 3, "lckv": 3, "lckv x dmc": 3}


@pytest.mark.parametrize("name", OWNERS)
def test_what_is_sent_are_keys_and_values_of_layers_that_compute_them(name: str) -> None:
    for sent in run_on_ranks(2, sent_in, Case(name, cp=2, micro_batch_size=1)):
        compression = MAPS[name]
        runs = [(step, run) for step in compression.plan(6) for run in step.runs if run.computes_kv]
        assert len({run.index for _, run in runs}) == OWNERS[name]
        traits = compression.policy.traits
        rows, heads, channels = 1, 2, 8
        pair = TOKENS * rows * heads * (2 * channels + traits.extra_channels)
        reach = traits.reach
        assert reach is not None
        # first and last tokens of 4 chunks: keys, values and the queries of 4 heads
        edges = 4 * (reach.before + reach.after) * rows * (2 * heads + 4) * channels
        expected = Counter({("all-reduce", 1): 2} if edges else {})  # a row's merge rate, and its gradient
        for numbers in filter(None, (pair, edges)):
            expected["all-gather", numbers] += len(runs)
            expected["reduce-scatter", numbers] += sum(step.requires_grad for step, _ in runs)
        assert sent == expected


def sent_in(case: Case) -> Counter[tuple[str, int]]:
    """Collectives of a forward and a backward, by kind and numbers of the whole; nothing but float32."""
    parallel, train = settings_of(case)
    stage = make_stage(MAPS[case.name], parallel, train)
    batch = next(batches_of(case))
    with pytest.raises(ValueError, match=r"policy\.chunk_rows is missing; with context parallelism it must"):
        stage(batch.tokens, batch.position_ids)
    policy = PolicyInputs(row_seeds=(0,), progress=0.5, chunk_rows=batch.chunk_rows)
    with Sent() as sent:
        losses, report = stage(batch.tokens, batch.position_ids, batch.labels, policy=policy)
        auxiliary = 0 if report.auxiliary_loss is None else report.auxiliary_loss.sum()
        (losses.total + auxiliary).backward()
    return sent.calls


class Sent(TorchDispatchMode):
    """Counts collectives of more than one rank."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        if function.namespace == "c10d":
            groups = [value for value in arguments if isinstance(value, torch.ScriptObject)]
            if any(dist.ProcessGroup.unbox(group).size() > 1 for group in groups[:1]):
                numbers = max(value.numel() for value in tree_leaves(arguments) if isinstance(value, Tensor))
                self.calls[kind_of(function._schema.name.split("::")[1]), numbers] += 1
        return function(*arguments, **(options or {}))
