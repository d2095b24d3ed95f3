"""How probable the tokens of a text are, each after those before it.

Shapes: s tokens, k most probable ones, V tokens of the vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lckv.generation.jobs import Job
from lckv.generation.sampling import Choice

Head = Callable[[Tensor], Tensor]
"""The language-model head: logits [s, V] of hidden states [s, hidden]."""


class Following(NamedTuple):
    """What a model says of s tokens that follow one another."""

    logprobs: Tensor
    """float32 [s]: natural logarithm of each token's probability."""

    greedy: Tensor
    """bool [s]: whether it is the most probable one."""

    best: Tensor
    """int64 [s, k]: the most probable tokens, the best first."""

    best_logprobs: Tensor
    """float32 [s, k]."""

    finite: Tensor
    """bool [s]: whether the logits are numbers."""


def following(head: Head, hidden_states: Tensor, tokens: Sequence[int], best: int = 0) -> Following:
    """Of `tokens`: each comes after the token that the hidden state [s, hidden] at its place belongs to.
    `best`: k, as far as the vocabulary goes."""
    logits = head(hidden_states).float()
    wanted = torch.tensor(tokens, device=logits.device)
    total = logits.logsumexp(-1)
    own = logits.gather(-1, wanted[:, None]).squeeze(1)
    values, likeliest = logits.topk(min(best, logits.shape[-1]), -1)
    return Following(
        own - total, logits.argmax(-1) == wanted, likeliest, values - total[:, None], total.isfinite()
    )


def score_prompt(job: Job, head: Head, hidden_states: Tensor) -> None:
    """Give a request, if it asks for any, those of its prompt's log-probabilities that follow from the hidden
    states [s, hidden] of the next s tokens."""
    wanted, places = job.params.prompt_logprobs, job.unscored(len(hidden_states))
    if wanted is None or not places:
        return
    of_chunk = slice(places.start - job.computed, places.stop - job.computed)
    tokens = job.tokens[places.start + 1 : places.stop + 1]
    scored = following(head, hidden_states[of_chunk], tokens, wanted)
    job.add_prompt(list(_choices(tokens, scored)), finite=bool(scored.finite.all()))


def _choices(tokens: Sequence[int], scored: Following) -> Iterator[Choice]:
    rows = zip(
        tokens,
        scored.logprobs.tolist(),
        scored.best.tolist(),
        scored.best_logprobs.tolist(),
        strict=True,
    )
    for token, logprob, best, values in rows:
        yield Choice(token, logprob, tuple(zip(best, values, strict=True)))
