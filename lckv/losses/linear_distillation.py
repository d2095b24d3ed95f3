"""Divergence of a model's tokens from a teacher's, mixed with the cross-entropy, over chunks of tokens:
neither the student's logits of all tokens are in memory nor the teacher's.

As a plain computation, of one token, with log-probabilities lp of the student and lq of the teacher:

    student_teacher    D = sum_v exp(lp) (lp - lq)      d D / d logits = p (lp - lq - D)
    teacher_student    D = sum_v exp(lq) (lq - lp)      d D / d logits = p - q

    objective = weight D + cross_entropy_weight cross-entropy

Distillation as of Hinton et al. (2015) at temperature 1 is teacher_student; that of NVIDIA's public code for
delayed eviction is student_teacher. Only the student learns. Of the k most likely tokens alone:
`top_tokens.py`.

Shapes: n tokens, c of a chunk, h channels (the teacher may have other ones), v rows of this rank.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lckv.losses.chunks import ChunkLoss, by_chunks
from lckv.losses.products import logits_of, room_for_logits
from lckv.losses.token_losses import TokenLosses, Vocabulary
from lckv.losses.top_tokens import join_unlikely

Divergence = Literal["student_teacher", "teacher_student"]
_NEVER = -1e30
"""Logit of padding. Not -inf: the difference of two is a number."""


@dataclass(frozen=True)
class Teacher:
    """What the teacher makes of the same tokens. Neither gets a gradient."""

    states: Tensor
    """Its last hidden states [n, h]."""

    weight: Tensor
    """Of its output layer, [v, h]: rows of the same tokens as the student's."""


@dataclass(frozen=True)
class DistillationTerms:
    """What the objective is made of."""

    divergence: Divergence = "teacher_student"
    weight: float = 1.0
    cross_entropy_weight: float = 0.0
    top_k: int | None = None
    """Tokens that the teacher deems most likely, each of which counts; the others count as one. None: all
    count."""

    def divergence_of(self, objective: float, cross_entropy: float) -> float:
        """D, from means over tokens; not a number where it has no weight."""
        if self.weight == 0:
            return float("nan")
        return (objective - self.cross_entropy_weight * cross_entropy) / self.weight


@dataclass(frozen=True)
class Lesson:
    """A teacher, and what is learned from it."""

    teacher: Teacher
    terms: DistillationTerms


def linear_distillation(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    teacher: Teacher,
    terms: DistillationTerms,
    token_weights: Tensor | None = None,
    vocabulary: Vocabulary | None = None,
    weight_gradient: Tensor | None = None,
    chunk_size: int = 0,
) -> TokenLosses:
    """Of hidden states [n, h] under the output weight [v, h], for targets int64 [n]; the other arguments and
    the errors are those of `linear_cross_entropy`. Where the vocabulary is split, a chunk costs three
    collectives of [c] numbers, and with top_k two more.

    Raises ValueError where the teacher has other tokens or another vocabulary, and where this has fewer
    tokens than top_k.
    """
    if len(teacher.states) != len(states) or len(teacher.weight) != len(weight):
        raise ValueError(
            f"the teacher has {len(teacher.states)} tokens and {len(teacher.weight)} rows of the vocabulary, "
            f"the student {len(states)} and {len(weight)}"
        )
    vocabulary = Vocabulary(len(weight)) if vocabulary is None else vocabulary
    if terms.top_k is not None and not 1 <= terms.top_k <= vocabulary.size:
        raise ValueError(f"top_k is {terms.top_k}; it must be from 1 to {vocabulary.size}, the vocabulary")
    return by_chunks(
        states,
        weight,
        targets,
        _Loss(Teacher(teacher.states.detach(), teacher.weight.detach()), terms, vocabulary),
        token_weights=token_weights,
        vocabulary=vocabulary,
        weight_gradient=weight_gradient,
        chunk_size=chunk_size,
    )


class _Loss:
    """`LossOfChunk` of a student beside its teacher."""

    def __init__(self, teacher: Teacher, terms: DistillationTerms, vocabulary: Vocabulary) -> None:
        self._teacher, self._terms, self._vocabulary = teacher, terms, vocabulary
        self._room: Tensor | None = None

    def __call__(self, part: slice, logits: Tensor, targets: Tensor, weights: Tensor | None) -> ChunkLoss:
        terms, ignored = self._terms, targets < 0
        place, here = self._vocabulary.places(targets, logits.shape[1])
        own_logit = logits.gather(1, place[:, None])[:, 0].masked_fill(~here, 0)
        lse, own_logit = self._normalise(logits, own_logit)
        losses = (lse - own_logit).masked_fill(ignored, 0)
        of_teacher = self._logits_of_teacher(part)
        self._normalise(of_teacher, torch.zeros_like(own_logit))
        if terms.top_k is not None:
            join_unlikely(of_teacher, logits, terms.top_k, self._vocabulary)
        # both are log-probabilities now; what they differ by takes the teacher's memory
        if terms.divergence == "student_teacher":
            probabilities = logits.exp()
            difference = torch.sub(logits, of_teacher, out=of_teacher)
        else:
            probabilities = of_teacher.exp()
            difference = of_teacher.sub_(logits)
        divergence = self._vocabulary.sum(torch.linalg.vecdot(probabilities, difference))
        objective = terms.weight * divergence.masked_fill(ignored, 0) + terms.cross_entropy_weight * losses
        if weights is None:
            return ChunkLoss(losses, objective, None)
        if terms.divergence == "student_teacher":
            factor = difference.sub_(divergence[:, None]).mul_(terms.weight).add_(terms.cross_entropy_weight)
            gradient = factor.mul_(probabilities)
        else:
            gradient = logits.exp_().mul_(terms.weight + terms.cross_entropy_weight)
            gradient.sub_(probabilities, alpha=terms.weight)
        own = torch.full_like(losses, -terms.cross_entropy_weight).masked_fill(~here, 0)
        gradient.scatter_add_(1, place[:, None], own[:, None])
        return ChunkLoss(losses, objective, gradient.mul_(weights[:, None]))

    def _logits_of_teacher(self, part: slice) -> Tensor:
        """[c, v], in memory of their own that every chunk uses."""
        states, weight = self._teacher.states, self._teacher.weight
        if self._room is None:
            self._room = room_for_logits(states, weight, len(states[part]))
        return logits_of(states[part], weight, self._room)

    def _normalise(self, logits: Tensor, own_logit: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [c, v] to log-probabilities, in their place. The logsumexp [c] and the `own_logit` [c] of
        the whole vocabulary."""
        self._vocabulary.hide_padding(logits, _NEVER)
        lse, own_logit = self._vocabulary.join(logits.logsumexp(1), own_logit)
        logits.sub_(lse[:, None])
        return lse, own_logit
