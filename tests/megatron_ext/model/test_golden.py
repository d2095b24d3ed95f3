"""The Megatron model reproduces the numbers recorded from the official LCKV code, and from that of YOCO++, in
every layout."""

from dataclasses import dataclass
from itertools import product

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from megatron_ext.config import ParallelConfig, TrainConfig
from megatron_ext.data.batch import Batch
from megatron_ext.evaluation.logits import compute_logits
from megatron_ext.model.build import build_stage, wrap
from megatron_ext.model.gpt import SharedKVGPTModel
from megatron_ext.model.initialization import global_parameters, shard
from megatron_ext.parallel.process_groups import chunks_of_rank, initialize
from megatron_ext.schedule.micro_batches import mean_loss, run_schedule
from megatron_ext.schedule.statistics_meter import StatisticsMeter
from tests.golden import yocopp_models
from tests.golden.lckv_models import NAMES, Golden
from tests.ranks import run_on_ranks
from tests.thinning import thinned

TOKENS = 24


@dataclass(frozen=True)
class Layout:
    """One way to run the recorded batch of 2 x 24 tokens."""

    world_size: int = 1
    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"
    modules: tuple[str, ...] = ("core_attn",)
    backend: str = "sdpa"
    micro_batch_size: int = 1
    overlap: bool = False
    virtual: int | None = None
    cp: int = 1
    stages: str | None = None

    def __str__(self) -> str:
        words = [
            f"tp{self.tp}",
            f"pp{self.pp}",
            f"dp{self.world_size // (self.tp * self.pp * self.cp)}",
            self.recompute,
        ]
        words += [self.backend] * (self.backend != "sdpa") + ["sp"] * self.sequence_parallel
        words += [f"cp{self.cp}"] * (self.cp > 1)
        words += [f"vpp{self.virtual}"] * (self.virtual is not None)
        words += [self.stages] * (self.stages is not None)
        words += ["overlap"] * self.overlap + list(self.modules) * (self.recompute == "selective")
        return "-".join([*words, f"mbs{self.micro_batch_size}"])


@dataclass(frozen=True)
class Errors:
    """Largest differences from the recorded numbers."""

    logits: float
    loss: float
    gradient: float
    """Of a tensor, relative to its largest recorded gradient."""
    worst: str


ANY_MAP = [
    Layout(),
    Layout(micro_batch_size=2),
    Layout(recompute="full"),
    Layout(recompute="selective"),
    Layout(recompute="selective", modules=("core_attn", "mlp")),
    Layout(backend="reference"),
    Layout(2, tp=2),
    Layout(2, tp=2, sequence_parallel=True, recompute="full"),
    Layout(2),
    Layout(2, overlap=True),
    Layout(4, tp=2, sequence_parallel=True),
    Layout(4, tp=4, micro_batch_size=2),
]
PIPELINES = [
    Layout(2, pp=2),
    Layout(2, pp=2, recompute="full"),
    Layout(4, tp=2, pp=2, sequence_parallel=True),
    Layout(2, pp=2, virtual=2, stages="auto"),
    Layout(4, pp=2, stages="auto", recompute="selective"),
]


@pytest.mark.parametrize(("layout", "name"), thinned(product(ANY_MAP, NAMES), 2), ids=str)
def test_every_map(layout: Layout, name: str) -> None:
    check(name, layout)


@pytest.mark.parametrize("layout", PIPELINES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_pipelines(name: str, layout: Layout) -> None:
    check(name, layout)


@pytest.mark.parametrize("name", ["lckv_w2", "sandwich_middle", "sliding_cyclic"])
def test_context_parallelism(name: str) -> None:
    check(name, Layout(2, cp=2))


MIXED = [
    Layout(),
    Layout(recompute="full", micro_batch_size=2),
    Layout(2, tp=2, sequence_parallel=True, recompute="selective"),
    Layout(4, tp=4),
    Layout(2, pp=2),
    Layout(4, tp=2, pp=2, sequence_parallel=True, recompute="full"),
    Layout(2, pp=2, virtual=2, stages="auto"),
    Layout(2, cp=2),
]


@pytest.mark.parametrize(("layout", "name"), thinned(product(MIXED, yocopp_models.NAMES[:2]), 2), ids=str)
def test_mixed_sources(layout: Layout, name: str) -> None:
    check(name, layout)


def recorded(name: str) -> Golden:
    return yocopp_models.load(name) if name in yocopp_models.NAMES else Golden.load(name)


def check(name: str, layout: Layout) -> None:
    tolerance = recorded(name).tolerance
    for errors in run_on_ranks(layout.world_size, errors_of, name, layout):
        assert errors.logits <= tolerance["logits"]
        assert errors.loss <= tolerance["loss"]
        assert errors.gradient <= tolerance["grad_rel"], errors.worst


def errors_of(name: str, layout: Layout) -> Errors:
    """Run on every rank: this rank's largest differences."""
    golden = recorded(name)
    parallel = ParallelConfig(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.virtual,
        pipeline_model_parallel_layout=layout.stages,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sequence_parallel,
        overlap_grad_reduce=layout.overlap,
        overlap_param_gather=layout.overlap,
    )
    train = TrainConfig(
        micro_batch_size=layout.micro_batch_size,
        global_batch_size=2,
        seq_length=TOKENS,
        precision="fp32",
        recompute_granularity=layout.recompute,
        recompute_modules=layout.modules,
    )
    initialize(parallel, seed=1)
    settings = golden.model.__class__(**{**vars(golden.model), "attention_backend": layout.backend})
    stage = build_stage(settings, golden.compression, parallel, train, vocab_size=settings.vocab_size)
    load(stage, golden)
    through_schedule = layout.pp > 1 or layout.cp > 1
    logits_error = (error_of_gathered_logits if through_schedule else error_of_logits)(stage, golden)
    model = wrap(stage, parallel, train)
    meter = StatisticsMeter(model)
    samples = rows(golden, train)
    losses = run_schedule(model, samples, lambda batch: batch, train, meter, progress=0.0, forward_only=False)
    loss = mean_loss(losses).cross_entropy
    gather_gradients(model)
    gradient_error, worst = error_of_gradients(stage, golden)
    return Errors(logits_error, abs(loss - golden.tensors["loss"].item()), gradient_error, worst)


def load(stage: SharedKVGPTModel, golden: Golden) -> None:
    whole = golden.weights()
    with torch.no_grad():
        for name, parameter in global_parameters(stage):
            parameter.copy_(shard(stage, name, whole.pop(name)))
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        assert not whole, f"weights that the model does not have: {sorted(whole)}"


def rows(golden: Golden, train: TrainConfig) -> object:
    """The recorded batch, as micro-batches of this data-parallel rank."""
    ids = golden.tensors["input_ids"]
    mask = torch.ones(ids.shape)
    mask[:, -1] = 0
    positions = torch.arange(TOKENS).expand_as(ids)
    rank, size = parallel_state.get_data_parallel_rank(), train.micro_batch_size
    first = rank * 2 // parallel_state.get_data_parallel_world_size()
    for start in range(first, first + 2 // parallel_state.get_data_parallel_world_size(), size):
        part = slice(start, start + size)
        labels = golden.tensors["labels"].roll(-1, 1)
        whole = Batch(ids[part], labels[part], mask[part], positions[part], None)
        yield whole.of_rank(chunks_of_rank(), golden.compression.policy.traits.reach)


def error_of_logits(stage: SharedKVGPTModel, golden: Golden) -> float:
    ids = golden.tensors["input_ids"]
    with torch.no_grad():
        logits, _ = stage(ids, torch.arange(TOKENS).expand_as(ids))
    ranks, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    expected = golden.tensors["logits"].chunk(ranks, dim=-1)[rank]
    return (logits - expected).abs().max().item()


def error_of_gathered_logits(stage: SharedKVGPTModel, golden: Golden) -> float:
    """Through all stages and chunks; 0 before the last stage."""
    logits = compute_logits(stage, golden.tensors["input_ids"])
    return 0.0 if logits is None else (logits - golden.tensors["logits"]).abs().max().item()


def gather_gradients(model: DistributedDataParallel) -> None:
    """After the distributed optimizer's reduce-scatter a rank holds its shard only: bring the others here."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for buffer in model.buffers:
        for bucket in buffer.buckets:
            mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)


def error_of_gradients(stage: SharedKVGPTModel, golden: Golden) -> tuple[float, str]:
    expected = golden.gradient()
    found = []
    for name, parameter in global_parameters(stage):
        whole = expected[name]
        difference = (parameter.main_grad - shard(stage, name, whole)).abs().max() / whole.abs().max()
        found.append((difference.item(), name))
    return max(found)
