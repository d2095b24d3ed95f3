"""A teacher of which the k most likely tokens count, and all others together.

With T these tokens, R the others, p_R and q_R what student and teacher give to all of R, the divergence is
one of distributions over k + 1 outcomes:

    student_teacher    D = sum_{v in T} p_v (lp_v - lq_v) + p_R (log p_R - log q_R)
    teacher_student    D = sum_{v in T} q_v (lq_v - lp_v) + q_R (log q_R - log p_R)

Value and gradient are those of the divergence over all tokens from a teacher that shares q_R out over R as
the student does:

    lq'_v = lp_v + log q_R - log p_R    for v in R

so that is what is put in the place of the teacher's log-probabilities. With k = V nothing changes.

Shapes: c tokens of a chunk, v rows of this rank, m = min(k, v).
"""

import torch
from torch import Tensor

from lckv.losses.token_losses import Vocabulary


def join_unlikely(teacher: Tensor, student: Tensor, k: int, vocabulary: Vocabulary) -> None:
    """Changes the teacher's log-probabilities [c, v] as said above; the student's [c, v] stay as they are. Of
    equally likely tokens any may be in T. Where the vocabulary is split: two collectives, of m and of 2
    numbers per token."""
    places, chosen = _most_likely(teacher, k, vocabulary)
    likely = teacher.gather(1, places)
    rests = torch.stack([_of_others(it, places, chosen) for it in (teacher, student)])
    of_teacher, of_student = vocabulary.of_ranks(rests).logsumexp(0)
    torch.add(student, (of_teacher - of_student)[:, None], out=teacher)
    teacher.scatter_(1, places, torch.where(chosen, likely, teacher.gather(1, places)))


def _most_likely(logits: Tensor, k: int, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """The m likeliest rows of this rank, int64 [c, m], and which are among the k likeliest of all ranks,
    bool [c, m]."""
    values, places = logits.topk(min(k, logits.shape[1]), dim=1, sorted=False)
    if not vocabulary.is_split:
        return places, torch.ones_like(places, dtype=torch.bool)
    assert vocabulary.group is not None
    of_all = vocabulary.of_ranks(values).transpose(0, 1).flatten(1)  # [c, ranks m], the same on every rank
    chosen = torch.zeros_like(of_all, dtype=torch.bool).scatter_(1, of_all.topk(k, dim=1).indices, True)
    return places, chosen.unflatten(1, (-1, values.shape[1]))[:, vocabulary.group.rank()]


def _of_others(log_probabilities: Tensor, places: Tensor, chosen: Tensor) -> Tensor:
    """logsumexp [c] over the rows [c, v] that are not chosen; -inf where all are."""
    own = log_probabilities.gather(1, places)
    log_probabilities.scatter_(1, places, own.masked_fill(chosen, -torch.inf))
    rest = log_probabilities.logsumexp(1)
    log_probabilities.scatter_(1, places, own)
    return rest
