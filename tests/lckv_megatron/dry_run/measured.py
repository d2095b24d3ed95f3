"""Measures how far the dry run's peak memory is from that of real training steps on CPUs.

    python -m tests.lckv_megatron.dry_run.measured --output tools/benchmarks/results/dry_run_error.csv

Every recipe runs with its own map, policy and recomputation, at small widths, for two steps on gloo. The peak
of the second step is counted from the profiler's events of PyTorch's allocator, which know nothing of the dry
run; the dry run pretends the CPU's kernels. Copies that gloo makes are left out.
"""

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lckv_megatron.dry_run.hardware import Machine
from lckv_megatron.dry_run.rank import RankRun, simulate
from lckv_megatron.measuring.timing import setting, write_csv
from megatron_ext.command_line import parse_run_config
from megatron_ext.config import RunConfig
from megatron_ext.data.batch import make_batch
from megatron_ext.model.build import build_stage, wrap
from megatron_ext.parallel.process_groups import chunks_of_rank, initialize
from megatron_ext.restoring.description import Description
from megatron_ext.restoring.model import build_described
from megatron_ext.restoring.teacher import layout_of_teacher
from megatron_ext.training.optimizer import build_optimizer
from megatron_ext.training.step import train_step
from megatron_ext.training.teacher import Teacher, terms_of
from tests.ranks import run_on_ranks

_EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
SMALL = [
    "--model.hidden_size=128", "--model.num_attention_heads=4", "--model.num_query_groups=2",
    "--model.kv_channels=null", "--model.ffn_hidden_size=384", "--model.vocab_size=1000",
    "--model.max_position_embeddings=null", "--train.seq_length=128", "--train.micro_batch_size=2",
    "--data.tokenizer_type=none", "--data.tokenizer_model=null", "--data.reset_attention_mask=false",
    "--data.reset_position_ids=false",
]  # fmt: skip
_SECOND = "second step"


@dataclass(frozen=True)
class Case:
    """A recipe at small width on few processes."""

    recipe: str
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    options: tuple[str, ...] = ()
    teacher: tuple[str, ...] | None = None
    """Options of the model that is learned from, on the same layout; None: there is none."""

    @property
    def world_size(self) -> int:
        """Processes."""
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def run(self) -> RunConfig:
        """Two micro-batches more than stages."""
        batch = 2 * (self.pipeline + 1) * self.data
        layout = (
            f"--parallel.tensor_model_parallel_size {self.tensor} "
            f"--parallel.sequence_parallel {'true' if self.tensor > 1 else 'false'} "
            f"--parallel.pipeline_model_parallel_size {self.pipeline} "
            f"--parallel.context_parallel_size {self.context} --train.global_batch_size {batch}"
        )
        return parse_run_config(
            ["--config", str(_EXAMPLES / self.recipe), *SMALL, *layout.split(), *self.options]
        )

    @property
    def described(self) -> Description | None:
        """The teacher."""
        if self.teacher is None:
            return None
        run = replace(self, options=self.teacher, teacher=None).run
        parallel, train = layout_of_teacher(run.parallel), replace(run.train, recompute_granularity="none")
        return Description(replace(run, parallel=parallel, train=train), run.model.vocab_size or 1)


WINDOW = ("--compression.sliding_window", "64")
CLA = (
    "--model.num_layers",
    "22",
    "--compression.layer_types",
    "_".join(f"{2 * (i // 2)}" for i in range(22)),
)
PLAIN = ("--model.num_layers", "22", "--compression.layer_types", "_".join(map(str, range(22))))
LEARNING = ("--train.distillation.teacher", "teacher", "--model.cross_entropy_chunk_size", "32")
ADAPTER = (
    *("--compression.policy.name", "dms", "--compression.policy.stage", "retrofit"),
    *("--compression.policy.window", "16", "--compression.policy.decision_source", "adapter"),
    *("--train.trainable", "policy"),
)
CASES = (
    Case("llama_1b_lckv/pretrain.yaml"),
    Case("llama_1b_lckv/pretrain.yaml", options=("--train.recompute_granularity", "full")),
    Case("yoco_3b/pretrain.yaml", pipeline=2, options=WINDOW),
    Case("llama2_13b_lckv/pretrain.yaml", tensor=2),
    Case("llama2_13b_dmc/retrofit.yaml", tensor=2),
    Case("shared_map/uptrain.yaml", options=CLA),
    Case("shared_map/uptrain.yaml", pipeline=2, options=(*CLA, *LEARNING), teacher=PLAIN),
    Case("shared_map/uptrain.yaml", options=(*PLAIN, *ADAPTER, *LEARNING), teacher=PLAIN),
)


class Issued(NamedTuple):
    """Collectives of one operation on groups of one size."""

    operation: str
    ranks: int


class Measured(NamedTuple):
    """The second step of a rank."""

    peak: int
    """Most bytes of tensors at a time."""
    issued: dict[Issued, tuple[int, int]]
    """How many collectives, and the bytes of all tensors that they were given."""


class _Issues(TorchDispatchMode):
    """Counts the collectives that are really issued."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: dict[Issued, tuple[int, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            leaves = tree_leaves(args)
            (group,) = (leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject) and _is_group(leaf))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            key = Issued(function._schema.name, dist.ProcessGroup.unbox(group).size())
            count, number = self.counted.get(key, (0, 0))
            self.counted[key] = count + 1, number + sum(tensor.nbytes for tensor in tensors)
        return function(*args, **(kwargs or {}))


def _is_group(value: torch.ScriptObject) -> bool:
    return str(value._type()).endswith("ProcessGroup")


def measured(run: RunConfig, teacher: Description | None = None) -> Measured:
    """Run two steps on this rank. Needs torch.distributed."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would tell of its own start and stop
    initialize(run.parallel, run.train.seed)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        issues = _train(run, teacher)
    results = profile.kineto_results
    assert results is not None
    (start,) = (event.start_ns() for event in results.events() if event.name() == _SECOND)
    events = (event for root in results.experimental_event_tree() for event in _memory_events(root))
    return Measured(_peak(sorted(events), start), issues.counted)


class _MemoryEvent(NamedTuple):
    nanoseconds: int
    address: int
    bytes: int
    """Negative where memory is given back."""
    of_transport: bool
    """Copies that gloo makes on the CPU: other transports make none. Its threads free them, unseen."""


def _memory_events(event: Any, of_transport: bool = False) -> Iterator[_MemoryEvent]:
    fields = event.extra_fields
    if isinstance(fields, torch._C._profiler._ExtraFields_Allocation):
        yield _MemoryEvent(event.start_time_ns, fields.ptr, fields.alloc_size, of_transport)
    for child in event.children:
        yield from _memory_events(child, of_transport or event.name.startswith(("c10d::", "gloo:")))


def _peak(events: Sequence[_MemoryEvent], start: int) -> int:
    """Most bytes at a time from nanosecond `start` on."""
    alive: dict[int, int] = {}
    total = peak = 0
    for event in events:
        total -= alive.pop(event.address, 0)  # freed, or another thread freed it before
        if event.bytes > 0 and not event.of_transport:
            alive[event.address] = event.bytes
            total += event.bytes
        if event.nanoseconds >= start:
            peak = max(peak, total)
    return peak


def _train(run: RunConfig, described: Description | None) -> _Issues:
    vocab_size = run.model.vocab_size or 1
    stage = build_stage(run.model, run.compression, run.parallel, run.train, vocab_size=vocab_size)
    teach = None
    if described is not None:
        teach = Teacher(build_described(described), terms_of(run.train.distillation))
    model = wrap(stage, run.parallel, run.train)
    optimizer, scheduler = build_optimizer(run.optimizer, run.parallel, run.train, model)
    if teach is not None:
        teach.share_weights(stage)
    samples = _samples(run, vocab_size)
    chunks, reach = chunks_of_rank(), run.compression.policy.traits.reach

    def step() -> None:
        train_step(
            model,
            optimizer,
            scheduler,
            samples,
            lambda sample: make_batch(sample, run.data, None, "cpu", chunks, reach),
            run.train,
            progress=0.5,
            teach=teach,
        )

    step()
    with torch.autograd.profiler.record_function(_SECOND), _Issues() as issues:
        step()
    return issues


def _samples(run: RunConfig, vocab_size: int) -> Iterator[dict[str, Tensor]]:
    shape = (run.train.micro_batch_size, run.train.seq_length)
    number = 0
    while True:
        tokens = torch.randint(vocab_size, (shape[0], shape[1] + 1))
        yield {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "sample_ids": torch.arange(number, number + shape[0]),
        }
        number += shape[0]


def predicted(run: RunConfig, *, rank: int, world_size: int, teacher: Description | None = None) -> RankRun:
    """A step by the dry run. Needs a process without process groups."""
    return simulate(
        run,
        rank=rank,
        world_size=world_size,
        vocab_size=run.model.vocab_size or 1,
        machine=Machine(),
        target="cpu",
        teacher=teacher,
    )


def compare(case: Case) -> Iterator[dict[str, object]]:
    """A row for each rank."""
    run, teacher = case.run, case.described
    real = run_on_ranks(case.world_size, measured, run, teacher)
    for rank, (peak, _) in enumerate(real):
        expected = predicted(run, rank=rank, world_size=case.world_size, teacher=teacher).memory.peak_bytes
        yield {
            "recipe": case.recipe,
            "options": " ".join(case.options),
            "teacher": " ".join(case.teacher or ()),
            "tensor": case.tensor,
            "pipeline": case.pipeline,
            "rank": rank,
            "measured_bytes": peak,
            "predicted_bytes": expected,
            "error_percent": round(100 * (expected / peak - 1), 2),
        }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="CSV file")
    parser.add_argument("--only", help="recipes whose name contains this")
    options = parser.parse_args(argv)
    rows: list[Mapping[str, object]] = []
    for case in CASES:
        if options.only is None or options.only in case.recipe:
            for row in compare(case):
                print(" ".join(map(str, row.values())), flush=True)
                rows.append({**row, **setting("cpu")})
    if options.output is not None:
        write_csv(options.output, rows)


if __name__ == "__main__":
    main()
