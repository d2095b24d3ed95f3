"""What of a teacher is in memory: states of one micro-batch on one stage, of those that wait on several;
weights that are the student's, once."""

import weakref
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lckv.config import CompressionConfig
from lckv.losses.linear_distillation import DistillationTerms
from lckv.policies.dms.config import DMSConfig
from megatron_ext.config import ParallelConfig, TrainConfig
from megatron_ext.data.batch import Batch
from megatron_ext.model.build import build_stage
from megatron_ext.model.trainable import choose_trainable
from megatron_ext.training import teacher as module
from megatron_ext.training.teacher import Teacher
from tests.megatron_ext.model.stages import MODEL, VOCAB, make_stage
from tests.ranks import run_on_ranks


class Stage(torch.nn.Module):
    """Remembers what it made."""

    pre_process = True

    def __init__(self, *, post_process: bool) -> None:
        super().__init__()
        self.post_process = post_process
        self.made: list[weakref.ref[Tensor]] = []

    def states(self, tokens: Tensor, *_: object) -> tuple[Tensor, None]:
        states = torch.ones(*tokens.t().shape, 4)
        self.made.append(weakref.ref(states))
        return states, None

    def output_weight(self) -> Tensor:
        return torch.ones(5, 4)

    @property
    def alive(self) -> int:
        return sum(states() is not None for states in self.made)


def batches(number: int) -> list[Batch]:
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    return [Batch(tokens, tokens, torch.ones(2, 3), tokens, None) for _ in range(number)]


def test_one_stage_reads_when_it_is_asked() -> None:
    stage = Stage(post_process=True)
    taught = Teacher(cast(Any, stage), DistillationTerms())(iter(batches(3)), 3)
    for made in (1, 2, 3):
        _, lesson = next(taught)
        assert lesson is not None
        assert lesson.teacher.states.shape == (6, 4)
        del lesson
        assert (len(stage.made), stage.alive) == (made, 0)


def test_several_stages_keep_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_forward(
        stage: Any, read: Any, passage: Any, *, number: int, shape: tuple[int, int]
    ) -> list[Tensor]:
        assert (number, shape) == (3, (3, 2))
        return [passage.forward(batch)[0] for batch in read]

    monkeypatch.setattr(module, "run_forward", run_forward)
    stage = Stage(post_process=False)
    source = iter(batches(5))
    taught = Teacher(cast(Any, stage), DistillationTerms())(source, 3)
    assert len(stage.made) == 3, "before the first is asked for"
    assert len(list(source)) == 2, "those of the next step stay"
    for waiting in (2, 1, 0):
        _, lesson = next(taught)
        assert lesson is not None
        del lesson
        assert stage.alive == waiting
    assert list(taught) == []


def test_frozen_weights_that_are_the_teachers_are_in_memory_once() -> None:
    run_on_ranks(1, check_sharing)


def check_sharing() -> None:
    adapting = CompressionConfig("0_0_2_2_4_4", policy=DMSConfig(stage="retrofit", decision_source="adapter"))
    student = make_stage(adapting, ParallelConfig())
    training = TrainConfig(precision="fp32")
    stage = build_stage(MODEL, CompressionConfig("0_0_2_2_4_4"), ParallelConfig(), training, vocab_size=VOCAB)
    names = dict(stage.named_parameters())
    changed = "decoder.layers.1.mlp.linear_fc1.weight"
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if name in names:
                weight.copy_(names[name])
        stage.get_parameter(changed).add_(1)
    teacher = Teacher(stage, DistillationTerms())
    (batch,) = batches(1)
    before = next(teacher(iter([batch]), 1))[1]
    assert teacher.share_weights(student) == 0, "what is trained will differ"
    choose_trainable(student, "policy")
    numbers = sum(weight.numel() for name, weight in names.items() if name != changed)
    assert teacher.share_weights(student) == 4 * numbers
    own = dict(student.named_parameters())
    assert [name for name, weight in stage.named_parameters() if weight is not own[name]] == [changed]
    after = next(teacher(iter([batch]), 1))[1]
    assert before is not None and after is not None
    assert torch.equal(after.teacher.states, before.teacher.states)
