"""The teacher of a dry run: built and run as it is, with weights without numbers."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ext.config import RunConfig
from megatron_ext.model.block import SharedKVBlock
from megatron_ext.restoring.description import Description
from megatron_ext.restoring.model import build_described
from megatron_ext.schedule.ticks import Ticks, ticks_of
from megatron_ext.training.teacher import Teacher, terms_of


class TeacherBytes(NamedTuple):
    """Weights of a teacher."""

    own: int
    shared: int
    """With the student, whose frozen ones they are."""


class PretendedTeacher:
    """The teacher of `run` on this rank."""

    def __init__(self, described: Description, run: RunConfig) -> None:
        stage = build_described(described)
        self._decoder: SharedKVBlock = stage.decoder
        self.teach = Teacher(stage, terms_of(run.train.distillation))
        self.bytes = TeacherBytes(sum(weight.nbytes for weight in stage.parameters()), 0)
        self.waiting_bytes = 0
        """Of the states of a micro-batch, where they wait for their turn."""
        if stage.post_process and not stage.pre_process:
            tokens = run.parallel.tokens_of_rank(run.train.seq_length) * run.train.micro_batch_size
            self.waiting_bytes = tokens * stage.config.hidden_size * stage.config.params_dtype.itemsize

    def share_weights(self, student: torch.nn.Module) -> None:
        """Frozen weights of the same shape are taken for equal: there are no numbers to compare."""
        shared = self.teach.share_weights(student, equal=_same_shape)
        self.bytes = TeacherBytes(self.bytes.own - shared, shared)

    def ticks(self, micro_batches: int) -> Ticks | None:
        """See `ticks_on`."""
        return ticks_on(self._decoder, micro_batches, forward_only=True)


def ticks_on(decoder: SharedKVBlock, micro_batches: int, *, forward_only: bool = False) -> Ticks | None:
    """The list of a step's work where micro-batches come to a stage several times."""
    if not decoder.journey.circulates:
        return None
    config = decoder.config
    return ticks_of(
        config.placed, decoder.journey, micro_batches, config.pipeline_in_flight, forward_only=forward_only
    )


def _same_shape(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape
