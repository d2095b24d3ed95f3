"""How much of what a teacher makes is in memory: of one micro-batch on one stage, of those that wait on
several."""

import weakref
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lckv.losses.linear_distillation import DistillationTerms
from megatron_ext.data.batch import Batch
from megatron_ext.training import teacher as module
from megatron_ext.training.teacher import Teacher


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
