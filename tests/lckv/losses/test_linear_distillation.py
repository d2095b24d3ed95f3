"""Divergence from a teacher, chunk by chunk: against the plain formula in float64, the public code's recorded
numbers, and on several ranks that share the vocabulary."""

import itertools
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from lckv.losses.linear_distillation import (
    DistillationTerms,
    Divergence,
    Teacher,
    linear_distillation,
)
from lckv.losses.token_losses import TokenLosses, Vocabulary
from tests.lckv.losses.test_linear_cross_entropy import EXACT, PADDED, TRUE, Problem
from tests.ranks import run_on_ranks

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "dms" / "c_distill.safetensors"
DIRECTIONS: tuple[Divergence, ...] = get_args(Divergence)
MIXTURES = [
    (1.0, 0.0, None),
    (0.7, 0.4, None),
    (0.0, 1.0, None),
    (0.7, 0.4, 1),
    (1.0, 0.0, 5),
    (1.0, 0.0, TRUE),
]


class Lesson(Problem):
    """With a teacher that is narrower."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 1) -> None:
        super().__init__(dtype, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        states = torch.randn(len(self.states), 5, generator=generator).to(dtype)
        self.teacher = Teacher(states, torch.randn(len(self.weight), 5, generator=generator).to(dtype))

    def distilled(self, terms: DistillationTerms, **options: Any) -> TokenLosses:
        options = {"vocabulary": PADDED, "token_weights": self.token_weights, **options}
        return linear_distillation(
            self.states, self.weight, self.targets, teacher=self.teacher, terms=terms, **options
        )

    def plain(self, terms: DistillationTerms) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy and objective of each token, and the total."""
        logits = (self.states @ self.weight.t())[:, :TRUE]
        student = logits.log_softmax(1)
        teacher = (self.teacher.states @ self.teacher.weight.t())[:, :TRUE].log_softmax(1)
        if terms.top_k is not None:
            likely = teacher.argsort(1, descending=True)[:, : terms.top_k]
            student, teacher = coarser(student, likely), coarser(teacher, likely)
        one, other = (student, teacher) if terms.divergence == "teacher_student" else (teacher, student)
        divergence = kl_div(one, other, reduction="none", log_target=True).sum(1)
        losses = cross_entropy(logits, self.targets, reduction="none", ignore_index=-100)
        objective = (terms.weight * divergence + terms.cross_entropy_weight * losses) * (self.targets >= 0)
        return losses, objective, (self.token_weights * objective).sum()


def coarser(log_probabilities: Tensor, likely: Tensor) -> Tensor:
    """Of distributions [n, V]: the probabilities of the tokens `likely` [n, k], and of all others together
    where there are any; logarithms."""
    rows = []
    for row, kept in zip(log_probabilities, likely, strict=True):
        others = [v for v in range(len(row)) if v not in kept.tolist()]
        rest = [row[others].exp().sum().log()] if others else []
        rows.append(torch.stack([*row[kept], *rest]))
    return torch.stack(rows)


def gradients(problem: Problem, total: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(total, [problem.states, problem.weight]))


@pytest.mark.parametrize("divergence", DIRECTIONS)
@pytest.mark.parametrize(("weight", "cross_entropy_weight", "top_k"), MIXTURES)
@pytest.mark.parametrize("chunk_size", [0, 1, 7])
def test_it_is_the_plain_formula(
    divergence: Divergence, weight: float, cross_entropy_weight: float, top_k: int | None, chunk_size: int
) -> None:
    terms, lesson = DistillationTerms(divergence, weight, cross_entropy_weight, top_k), Lesson()
    done = lesson.distilled(terms, chunk_size=chunk_size)
    losses, objective, total = lesson.plain(terms)
    for mine, theirs in ((done.losses, losses), (done.objective, objective), (done.total, total)):
        torch.testing.assert_close(mine, theirs, **EXACT)
    for mine, theirs in zip(gradients(lesson, done.total), gradients(lesson, total), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize("divergence", DIRECTIONS)
@pytest.mark.parametrize("top_k", [None, 3])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(
    divergence: Divergence, top_k: int | None
) -> None:
    problem = Problem()
    teacher, terms = Teacher(problem.states, problem.weight), DistillationTerms(divergence, top_k=top_k)
    done = linear_distillation(problem.states, problem.weight, problem.targets, teacher=teacher, terms=terms)
    assert done.objective.abs().max() < 1e-14
    assert all(gradient.abs().max() < 1e-14 for gradient in gradients(problem, done.total))


def test_numbers_of_the_public_code() -> None:
    golden = load_file(GOLDEN)
    student, teacher = (golden[name].flatten(0, 1) for name in ("student", "teacher"))
    student.requires_grad_()
    eye, mask = torch.eye(student.shape[1]), golden["loss_mask"].flatten().float()
    targets = torch.zeros(len(student), dtype=torch.int64)
    values = {}
    for divergence in DIRECTIONS:  # the logits are states under the unit matrix
        done = linear_distillation(
            student, eye, targets, teacher=Teacher(teacher, eye), terms=DistillationTerms(divergence),
            token_weights=mask, chunk_size=5,
        )  # fmt: skip
        values[divergence] = done.total / mask.sum()
    torch.testing.assert_close(values["student_teacher"], golden["distill_loss"], rtol=0, atol=1e-6)
    torch.testing.assert_close(values["teacher_student"], golden["other_direction"], rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(values["student_teacher"], [student])
    torch.testing.assert_close(gradient, golden["grad_student"].flatten(0, 1), rtol=0, atol=5e-7)


@pytest.mark.parametrize("divergence", DIRECTIONS)
def test_more_tokens_tell_more(divergence: Divergence) -> None:
    """A coarser distribution is not further from another one; with all tokens it is the distribution."""
    lesson = Lesson()
    finer = [
        lesson.distilled(DistillationTerms(divergence, top_k=k)).objective for k in (1, 4, 9, TRUE, None)
    ]
    assert all((more >= less - 1e-12).all() for less, more in itertools.pairwise([0 * finer[0], *finer]))
    torch.testing.assert_close(finer[-2], finer[-1], **EXACT)


@pytest.mark.parametrize("divergence", DIRECTIONS)
def test_ranks_share_the_vocabulary(divergence: Divergence) -> None:
    assert run_on_ranks(2, share, divergence) == [None, None]


def share(divergence: Divergence) -> None:
    for top_k in (None, 1, 4, 9, TRUE):
        share_with(DistillationTerms(divergence, 0.7, 0.4, top_k))


def share_with(terms: DistillationTerms) -> None:
    lesson = Lesson()
    _, objective, total = lesson.plain(terms)
    of_states, of_weight = gradients(lesson, total)
    half = len(lesson.weight) // 2
    rows = slice(dist.get_rank() * half, (dist.get_rank() + 1) * half)
    weight = lesson.weight[rows].detach().requires_grad_()
    done = linear_distillation(
        lesson.states,
        weight,
        lesson.targets,
        teacher=Teacher(lesson.teacher.states, lesson.teacher.weight[rows]),
        terms=terms,
        token_weights=lesson.token_weights,
        vocabulary=Vocabulary(TRUE, rows.start, dist.group.WORLD),
        chunk_size=7,
    )
    torch.testing.assert_close(done.objective, objective, **EXACT)
    mine, of_mine = torch.autograd.grad(done.total, [lesson.states, weight])
    dist.all_reduce(mine)
    torch.testing.assert_close(mine, of_states, **EXACT)
    torch.testing.assert_close(of_mine, of_weight[rows], **EXACT)


def test_bfloat16_is_summed_in_float32() -> None:
    lesson = Lesson(torch.bfloat16)
    exact = Lesson()
    for name in ("states", "weight"):
        setattr(exact, name, getattr(lesson, name).detach().double().requires_grad_())
    exact.teacher = Teacher(lesson.teacher.states.double(), lesson.teacher.weight.double())
    terms = DistillationTerms()
    done = lesson.distilled(terms)
    assert done.total.dtype == torch.float32
    torch.testing.assert_close(done.total.double(), exact.plain(terms)[2], rtol=1e-5, atol=0)


def test_another_vocabulary_is_refused() -> None:
    lesson = Lesson()
    lesson.teacher = Teacher(lesson.teacher.states, lesson.teacher.weight[:-1])
    with pytest.raises(ValueError, match="the teacher has 23 tokens and 15 rows of the vocabulary"):
        lesson.distilled(DistillationTerms())


@pytest.mark.parametrize("top_k", [0, TRUE + 1])
def test_more_tokens_than_there_are_are_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k is {top_k}; it must be from 1 to {TRUE}, the vocabulary"):
        Lesson().distilled(DistillationTerms(top_k=top_k))
