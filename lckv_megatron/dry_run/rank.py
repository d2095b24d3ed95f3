"""The steps of one rank, run by the training program itself on tensors without numbers.

Two steps run, of n and of n + 1 micro-batches, n being the pipeline's stages, or where micro-batches come to
a stage several times, on their way or on a teacher's, those in flight and those that are prepared: from there
on every further micro-batch adds the same. What a step of M does is the second step and M - n - 1 times the
difference. The memory is that of the second step: the first has no moments yet, and more micro-batches do not
lie in memory at a time, but states of a teacher that wait, which are added.
Documents are as long as rows: their lengths are numbers.
"""

from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lckv_megatron.dry_run.collectives import Key, Total, add_up
from lckv_megatron.dry_run.hardware import Machine
from lckv_megatron.dry_run.host import HostUse, computing_again, pretended_host
from lckv_megatron.dry_run.layers import LayerRuns
from lckv_megatron.dry_run.memory import Curve, Kind, curve
from lckv_megatron.dry_run.recorder import Recorder, Work, spanning
from lckv_megatron.dry_run.replacements import Replacement, replaced
from lckv_megatron.dry_run.stand_ins import gpu_kernels
from lckv_megatron.dry_run.taught import PretendedTeacher, TeacherBytes, ticks_on
from lckv_megatron.dry_run.world import pretended_world
from lckv_megatron.memory_plan.requests import Request
from lckv_megatron.memory_plan.trace import Trace
from megatron_ext.config import RunConfig, TrainConfig
from megatron_ext.data.batch import Batch
from megatron_ext.model.build import build_stage, wrap
from megatron_ext.parallel.process_groups import chunks_of_rank
from megatron_ext.restoring.description import Description
from megatron_ext.schedule.ring import RingStage
from megatron_ext.schedule.ticks import Ticks
from megatron_ext.training.optimizer import build_optimizer
from megatron_ext.training.step import train_step

Target = Literal["gpu", "cpu"]
IN_SCHEDULE = ("forward", "backward", "schedule")
"""Phases of which every micro-batch adds some."""
_NUMBERS = [entry.name for entry in fields(Work) if entry.name != "collectives"]


@dataclass(frozen=True, eq=False)
class RankRun:
    """What one rank does in a step."""

    rank: int
    stage: int
    """Of the pipeline."""
    micro_batches: int
    memory: Curve
    collectives: dict[Key, Total]
    flops: float
    phases: dict[str, Work]
    """Kernels of the step, by kind of phase."""
    parameters: int
    micro_batch_seconds: float
    """That one micro-batch more adds, collectives included."""

    ring_bubble: float | None
    """Share of a step that stages wait by the list of its work; None where Megatron's schedule runs."""

    host: HostUse | None = None
    """Where activations go to the host."""

    teacher: TeacherBytes | None = None

    trace: Trace | None = None
    """Where it was asked for."""

    @property
    def busy_seconds(self) -> float:
        """That the rank computes, sends, or waits for copies, one after the other."""
        waited = 0.0 if self.host is None else self.host.waited_seconds
        return self.kernel_seconds + self.collective_seconds + waited

    @property
    def kernel_seconds(self) -> float:
        """Of the whole step."""
        return sum(work.seconds for work in self.phases.values())

    @property
    def collective_seconds(self) -> float:
        """Of the whole step."""
        return sum(total.seconds for total in self.collectives.values())


def simulate(
    run: RunConfig,
    *,
    rank: int,
    world_size: int,
    vocab_size: int,
    machine: Machine,
    target: Target = "gpu",
    traced: bool = False,
    teacher: Description | None = None,
) -> RankRun:
    """Build the model of `rank` and run its steps. Needs a process without process groups.

    `target`: whose kernels are pretended, a GPU's or those of the machine at hand. `traced`: keep every
    storage and the runs of layers. `teacher`: on the layout of the run, which learns from it; weights that
    are frozen and have the shape of its own are taken for equal.

    Raises RuntimeError where torch.distributed runs already, and ConfigError for an attention backend that
    cannot serve.
    """
    cu_seqlens = _rows_as_documents(run)  # with numbers: made before tensors have none
    with ExitStack() as stack:
        stack.enter_context(
            pretended_world(run.parallel, rank=rank, world_size=world_size, seed=run.train.seed)
        )
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        recorder = Recorder(machine, fake, granularity=512 if target == "gpu" else 1)
        layers = LayerRuns(recorder)
        replacements = [
            *layers.replacements(),
            Replacement(schedules, "forward_step", spanning(recorder, "forward", schedules.forward_step)),
            Replacement(schedules, "backward_step", spanning(recorder, "backward", schedules.backward_step)),
            Replacement(RingStage, "forward", spanning(recorder, "forward", RingStage.forward)),
            Replacement(RingStage, "backward", spanning(recorder, "backward", RingStage.backward)),
            computing_again(recorder),
            *(_of_gpu(run, teacher, recorder, machine) if target == "gpu" else ()),
        ]
        stack.enter_context(replaced(replacements))
        stack.enter_context(fake)
        stack.enter_context(recorder)
        program = _Program(run, vocab_size, recorder, cu_seqlens, teacher)
        result, start = _steps(program, run, rank, recorder)
        return replace(result, trace=_trace(recorder, layers, start)) if traced else result


def _of_gpu(
    run: RunConfig, teacher: Description | None, recorder: Recorder, machine: Machine
) -> Iterator[Replacement]:
    """What a GPU and its host have in place of this machine's."""
    policies = {model.compression.policy.name: model.compression.policy for model in _runs(run, teacher)}
    yield from gpu_kernels(recorder, *(policy.build() for policy in policies.values()))
    yield from pretended_host(recorder, run.train, machine.tflops)


def _runs(run: RunConfig, teacher: Description | None) -> Iterator[RunConfig]:
    yield run
    if teacher is not None:
        yield teacher.run


def _steps(program: "_Program", run: RunConfig, rank: int, recorder: Recorder) -> tuple[RankRun, int]:
    """What the rank does, and the event at which the second step begins."""
    replicas = parallel_state.get_data_parallel_world_size()
    wanted = run.train.global_batch_size // (run.train.micro_batch_size * replicas)
    ring = program.ticks(wanted)
    of_teacher = None if program.teacher is None else program.teacher.ticks(wanted)
    rings = [one for one in (ring, of_teacher) if one is not None]
    most = max(
        (one.in_flight + one.ahead for one in rings), default=run.parallel.pipeline_model_parallel_size
    )
    few = min(wanted - 1, most)
    first = program.step(max(1, few), replicas)
    program.name_optimizer_state()
    start = recorder.now
    second = program.step(few + 1, replicas)
    end = recorder.now
    further = max(0, wanted - few - 1) if few else 0
    program.keep_waiting(further, start)
    phases = {name: _extrapolated(name, first.get(name), work, further) for name, work in second.items()}
    result = RankRun(
        rank=rank,
        stage=parallel_state.get_pipeline_model_parallel_rank(),
        micro_batches=wanted,
        memory=curve(recorder.allocations, recorder.phases, start, end),
        collectives=_collectives(first, second, further),
        flops=sum(work.flops for work in phases.values()),
        phases=phases,
        parameters=program.parameters,
        micro_batch_seconds=_schedule_seconds(second) - (_schedule_seconds(first) if few else 0.0),
        ring_bubble=None if ring is None else ring.bubble,
        host=program.host_use(phases.values()),
        teacher=None if program.teacher is None else program.teacher.bytes,
    )
    return result, start


def _trace(recorder: Recorder, layers: LayerRuns, start: int) -> Trace:
    """Of the whole program; `start` is the first event of its second step."""
    requests = [
        Request(storage.bytes, storage.start, recorder.now if storage.end is None else storage.end)
        for storage in recorder.allocations
        if storage.bytes
    ]
    return Trace(requests, [*layers.stretches()], start, recorder.now)


class _Program:
    """The training program of one rank."""

    def __init__(
        self,
        run: RunConfig,
        vocab_size: int,
        recorder: Recorder,
        cu_seqlens: Tensor | None,
        described: Description | None,
    ) -> None:
        self._run, self._recorder, self._cu_seqlens = run, recorder, cu_seqlens
        stage = build_stage(run.model, run.compression, run.parallel, run.train, vocab_size=vocab_size)
        self.parameters = sum(parameter.numel() for parameter in stage.parameters())
        self.teacher = None if described is None else PretendedTeacher(described, run)
        self.model = wrap(stage, run.parallel, run.train)
        for buffer in self.model.buffers:
            recorder.allocation(buffer.grad_data).kind = "gradients"
        self._name_new("parameters")
        self._optimizer, self._scheduler = build_optimizer(run.optimizer, run.parallel, run.train, self.model)
        self._name_new("optimizer")
        if self.teacher is not None:
            self.teacher.share_weights(stage)
        self._optimizer.step = spanning(recorder, "optimizer", self._optimizer.step)

    def ticks(self, micro_batches: int) -> Ticks | None:
        """The list of a step's work where micro-batches come to a stage several times."""
        return ticks_on(get_attr_wrapped_model(self.model, "decoder"), micro_batches)

    def host_use(self, works: Collection[Work]) -> HostUse | None:
        """What a step of these works takes of the host."""
        offloaded = get_attr_wrapped_model(self.model, "decoder").offloaded
        if offloaded is None:
            return None
        total = {name: sum(getattr(work, name) for work in works) for name in _NUMBERS}
        copied = total["to_host_bytes"] + total["from_host_bytes"]
        return HostUse(
            share=offloaded.share,
            pool_bytes=offloaded.storage.pool.allocated,
            to_host=total["to_host_bytes"],
            from_host=total["from_host_bytes"],
            seconds=copied / (self._run.train.offload_gigabytes_per_second * 1e9),
            waited_seconds=total["waited_seconds"],
            again_flops=total["again_flops"],
        )

    def step(self, micro_batches: int, replicas: int) -> dict[str, Work]:
        """One step of so many micro-batches; what was done, by kind of phase."""
        train = replace(
            self._run.train,
            global_batch_size=micro_batches * self._run.train.micro_batch_size * replicas,
        )
        self._recorder.work = {}
        reach = self._run.compression.policy.traits.reach
        with self._recorder.phase("schedule"):
            train_step(
                self.model,
                self._optimizer,
                self._scheduler,
                _samples(train),
                lambda sample: _batch(train, self._cu_seqlens).of_rank(chunks_of_rank(), reach),
                train,
                progress=0.5,
                teach=None if self.teacher is None else self.teacher.teach,
            )
        return self._recorder.work

    def keep_waiting(self, micro_batches: int, start: int) -> None:
        """A teacher on several stages reads all micro-batches at first: states of so many more wait in the
        step that began with event `start`, until the student has read the last one."""
        waiting = 0 if self.teacher is None else micro_batches * self.teacher.waiting_bytes
        if waiting:
            self._recorder.wait_for_forward(waiting, start)

    def name_optimizer_state(self) -> None:
        """What the first step of the optimizer has made and kept."""
        self._name_new("optimizer", "optimizer")

    def _name_new(self, kind: Kind, phase: str | None = None) -> None:
        for allocation in self._recorder.allocations:
            its_phase = self._recorder.phases[allocation.phase].kind
            if allocation.kind is None and allocation.end is None and phase in (None, its_phase):
                allocation.kind = kind


def _samples(train: TrainConfig) -> Iterator[dict[str, Tensor]]:
    while True:
        yield {"sample_ids": torch.zeros(train.micro_batch_size, dtype=torch.int64)}


def _rows_as_documents(run: RunConfig) -> Tensor | None:
    if run.data.format != "chat" and not run.data.reset_attention_mask:
        return None
    return torch.arange(run.train.micro_batch_size + 1, dtype=torch.int32) * run.train.seq_length


def _batch(train: TrainConfig, cu_seqlens: Tensor | None) -> Batch:
    shape = (train.micro_batch_size, train.seq_length)
    tokens = torch.zeros(shape, dtype=torch.int64)
    return Batch(
        tokens=tokens,
        labels=torch.zeros(shape, dtype=torch.int64),
        loss_mask=torch.ones(shape),
        position_ids=torch.zeros(shape, dtype=torch.int64),
        cu_seqlens=cu_seqlens,
        sample_ids=tuple(range(train.micro_batch_size)),
    )


def _extrapolated(name: str, first: Work | None, second: Work, further: int) -> Work:
    """The second step's and `further` times what it has more than the first."""
    if name not in IN_SCHEDULE or first is None:
        return second
    return Work(
        *(
            getattr(second, number) + further * (getattr(second, number) - getattr(first, number))
            for number in _NUMBERS
        )
    )


def _schedule_seconds(step: dict[str, Work]) -> float:
    of_schedule = [step[name] for name in IN_SCHEDULE if name in step]
    collectives = (collective.seconds for work in of_schedule for collective in work.collectives)
    return sum(work.seconds + work.waited_seconds for work in of_schedule) + sum(collectives)


def _collectives(first: dict[str, Work], second: dict[str, Work], further: int) -> dict[Key, Total]:
    """Phases of the schedule together: the first step reduces gradients behind backward, later ones in it."""

    def of_schedule(step: dict[str, Work]) -> dict[Key, Total]:
        return add_up(
            collective for name in IN_SCHEDULE if name in step for collective in step[name].collectives
        )

    result = add_up(collective for work in second.values() for collective in work.collectives)
    before = of_schedule(first)
    for key, total in of_schedule(second).items():
        result[key] += (total + before.get(key, Total()).times(-1)).times(further)
    return result
