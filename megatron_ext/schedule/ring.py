"""Micro-batches around a ring of pipeline stages: runs the list of `megatron_ext.schedule.ticks` on this
rank's stage."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lckv.policies.base import KeyValue
from lckv.sharing.journey import Journey, Visit
from lckv.sharing.plan import LayerGroup
from megatron_ext.model.policy_statistics import PolicyReport
from megatron_ext.model.stages import StageCall, StageKept
from megatron_ext.schedule.mail import Mail
from megatron_ext.schedule.ticks import Message, Tick, Ticks, Work

Input = TypeVar("Input")
Visited = TypeVar("Visited", contravariant=True)


class Finished(NamedTuple):
    """What the loss of a micro-batch is."""

    loss: Tensor
    """What is differentiated: a sum over tokens."""

    tokens: Tensor
    """How many, int32."""

    collected: Tensor
    """What the caller gets."""


class Passage(Protocol[Visited]):
    """What a stage does with its micro-batches."""

    def forward(self, micro_batch: Visited, call: StageCall) -> tuple[Any, PolicyReport]:
        """The model, for one visit: what the next visit gets, or what `finish` takes."""
        ...

    def finish(self, micro_batch: Visited, output: Any, report: PolicyReport) -> Finished:
        """Of a micro-batch that leaves the model."""
        ...


class OncePassage(Passage[Visited], Protocol[Visited]):
    """The same where a stage may be visited once."""

    def forward(self, micro_batch: Visited, call: StageCall | None = None) -> tuple[Any, PolicyReport]:
        """Without `call` the stage is visited once."""
        ...


def run_ring(
    model: MegatronModule,
    inputs: Iterator[Input],
    passage: Passage[Input],
    add_report: Callable[[PolicyReport], None],
    ticks: Ticks,
    shape: tuple[int, int],
    *,
    forward_only: bool,
) -> list[Tensor]:
    """Forward, and unless `forward_only` backward, of all micro-batches, whose tokens have `shape` (s, b) on
    this rank.

    Returns what `Finished` collects, by micro-batch, on the last stage; nothing on others. Gradients are
    summed and reduced when it ends.
    """
    config = get_model_config(model)
    if config.timers is not None:
        config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)
    get_attr_wrapped_model(model, "set_is_first_microbatch")()
    ring = RingStage(model, inputs, passage, add_report, ticks, shape, forward_only=forward_only)
    no_sync = nullcontext if forward_only or config.no_sync_func is None else config.no_sync_func
    with no_sync():
        ring.run()
    if not forward_only:
        if config.no_sync_func is not None:
            model.start_grad_sync()
        config.finalize_model_grads_func([model], ring.tokens)
    if config.timers is not None:
        config.timers("forward-backward").stop()
    return [ring.collected[number] for number in sorted(ring.collected)]


@dataclass
class _Done:
    """A forward visit that waits for its backward."""

    arrived: Tensor | None
    made: list[GradientEdge | None]
    """Where in the graph what it computed is: what was sent, or the loss, and what was kept; None: without
    gradient."""

    leaves: list[Tensor]
    """Where the gradients of what was kept gather."""


@dataclass
class _InFlight(Generic[Input]):
    """A micro-batch on this stage."""

    content: Input
    reports: list[PolicyReport] = field(default_factory=list)
    kept: dict[tuple[Work, LayerGroup], StageKept] = field(default_factory=dict)
    prepared: dict[LayerGroup, dict[int, KeyValue]] = field(default_factory=dict)
    done: dict[int, _Done] = field(default_factory=dict)
    """By number of the visit."""


class RingStage(Generic[Input]):
    """This rank's part of a step."""

    def __init__(
        self,
        model: MegatronModule,
        inputs: Iterator[Input],
        passage: Passage[Input],
        add_report: Callable[[PolicyReport], None],
        ticks: Ticks,
        shape: tuple[int, int],
        *,
        forward_only: bool,
    ) -> None:
        self._decoder = get_attr_wrapped_model(model, "decoder")
        self._config = get_model_config(model)
        journey: Journey = self._decoder.journey
        self._visits = {
            Work.PREPARE: journey.prepare, Work.FORWARD: journey.train, Work.BACKWARD: journey.train
        }  # fmt: skip
        self._inputs, self._passage, self._add_report = inputs, passage, add_report
        self._shape, self._forward_only = shape, forward_only
        stage = self._decoder.stage
        self._ticks = ticks.of_stage(stage)
        trains = [tick for tick in self._ticks if tick.work is Work.FORWARD]
        self._last_forward = {tick.micro_batch: tick.visit for tick in trains}
        self._last = {tick.micro_batch: tick for tick in self._ticks}
        self._mail = Mail(ticks.messages, stage, self._new_message)
        self._number_read = 0
        self._in_flight: dict[int, _InFlight[Input]] = {}
        self.collected: dict[int, Tensor] = {}
        """By micro-batch."""

        self.tokens = torch.zeros([], dtype=torch.int, device=self._device)
        """Of the losses, over all micro-batches."""

    @property
    def _device(self) -> torch.device:
        return next(self._decoder.parameters()).device

    def run(self) -> None:
        """All of this stage's work."""
        for tick in self._ticks:
            self._mail.exchange(tick.start)
            if tick.work is Work.BACKWARD:
                self.backward(tick)
            else:
                self.forward(tick)
            if self._last[tick.micro_batch] is tick:
                del self._in_flight[tick.micro_batch]
        self._mail.exchange(float("inf"))
        self._mail.wait()

    def _new_message(self, message: Message) -> Tensor:
        """Room for what another stage sends: what a visit gets, or the gradient of what it sent."""
        visit = self._visits[message.work][message.visit]
        backward = message.work is Work.BACKWARD
        payload = self._decoder.payload_out(visit) if backward else self._decoder.payload_in(visit)
        return torch.empty(
            payload.shape(*self._shape), dtype=self._config.pipeline_dtype, device=self._device
        )

    def _micro_batch(self, number: int) -> _InFlight[Input]:
        while self._number_read <= number:
            self._in_flight[self._number_read] = _InFlight(next(self._inputs))
            self._number_read += 1
        return self._in_flight[number]

    def forward(self, tick: Tick) -> None:
        """A visit that prepares or trains."""
        flight = self._micro_batch(tick.micro_batch)
        visit, trains = self._visits[tick.work][tick.visit], tick.work is Work.FORWARD
        arrived = None if visit.receives is None else self._mail.take(tick)
        if not visit.steps:
            self._arrive(flight, visit, arrived)
            return
        learns = trains and not self._forward_only
        if learns and arrived is not None:
            arrived.requires_grad_()
        kept = flight.kept[tick.work, visit.takes] if visit.takes else None
        prepared = flight.prepared.pop(visit.prepared) if visit.prepared else None
        call = StageCall(visit, arrived, kept, prepared)
        with nullcontext() if learns else torch.no_grad():
            output, report = self._passage.forward(flight.content, call)
            if trains:
                self._drop_preparation(flight)
                flight.reports.append(report)
            if visit.sends is None:
                output = self._finish(tick, flight, output)
            else:
                output = output.to(self._config.pipeline_dtype)
                self._mail.give(tick, output.detach())
        if visit.prepares is not None:
            flight.prepared[visit.prepares] = call.notes.prepared
        made, leaves = [output], []
        if visit.keeps is not None and call.notes.kept is not None:
            flight.kept[tick.work, visit.keeps] = call.notes.kept.leaves()
            made += call.notes.kept.tensors()
            leaves = flight.kept[tick.work, visit.keeps].tensors()
        if learns:
            flight.done[tick.visit] = _Done(arrived, list(map(_edge, made)), leaves)
        if trains and self._last_forward[tick.micro_batch] == tick.visit:
            self._add_report(_joined(flight.reports))

    def _arrive(self, flight: _InFlight[Input], visit: Visit, arrived: Tensor | None) -> None:
        """What was prepared comes to where the group begins."""
        assert visit.prepares is not None and arrived is not None
        freight = self._decoder.unload(visit, arrived, *self._shape)
        flight.prepared[visit.prepares] = dict(freight.previous)
        flight.kept.pop((Work.PREPARE, visit.prepares), None)

    @staticmethod
    def _drop_preparation(flight: _InFlight[Input]) -> None:
        """What its visits kept."""
        for group in [group for work, group in flight.kept if work is Work.PREPARE]:
            del flight.kept[Work.PREPARE, group]

    def _finish(self, tick: Tick, flight: _InFlight[Input], output: Tensor) -> Tensor:
        """The loss of a micro-batch that leaves the model."""
        finished = self._passage.finish(flight.content, output, _joined(flight.reports))
        self.collected[tick.micro_batch] = finished.collected
        self.tokens += finished.tokens
        scale = self._config.grad_scale_func
        return finished.loss if scale is None else scale(finished.loss)

    def backward(self, tick: Tick) -> None:
        """A visit's backward: gradients of what it sent, or of the loss, and of what it kept."""
        flight = self._in_flight[tick.micro_batch]
        visit, done = self._visits[tick.work][tick.visit], flight.done.pop(tick.visit)
        output, *kept = done.made
        assert output is not None
        gradients = [None if visit.sends is None else self._mail.take(tick)]
        roots = [output]
        for edge, leaf in zip(kept, done.leaves, strict=True):
            if edge is not None and leaf.grad is not None:
                roots.append(edge)
                gradients.append(leaf.grad)
        torch.autograd.backward(roots, gradients)
        if done.arrived is not None:
            gradient = done.arrived.grad
            self._mail.give(tick, torch.zeros_like(done.arrived) if gradient is None else gradient)


def _edge(tensor: Tensor) -> GradientEdge | None:
    """The tensor's place in the graph, without its numbers."""
    return get_gradient_edge(tensor) if tensor.requires_grad else None


def _joined(reports: Sequence[PolicyReport]) -> PolicyReport:
    """What all visits of a micro-batch to a stage report; the last one has the sums."""
    statistics = {layer: values for report in reports for layer, values in report.statistics.items()}
    return PolicyReport(statistics, reports[-1].sums, reports[-1].auxiliary_loss)
