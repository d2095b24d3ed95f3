"""The next tokens of requests: one for each, and as many of its draft's as are those that it gets anyway.

Every place of a draft gets its token as if those before it had come one by one: from its own logits, with the
penalties and the grammar of what comes before it, and with the random number that the request has for it. A
draft goes on as long as it has that token. So an answer, sampled or greedy, is the same with and without
drafts, whatever they are; they only change how many tokens a step gives.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite
from typing import NamedTuple

from torch import Tensor

from lckv.generation.constraints import Constraint, allowed_tokens
from lckv.generation.draws import Drawn
from lckv.generation.jobs import Job
from lckv.generation.requests import TokenEvent
from lckv.generation.sampling import Choice, sample

NOT_FINITE = "the model's logits are not finite; are its weights and dtype right?"
"""What is said of a model that gives no token."""


class Verified(NamedTuple):
    """What a request gets."""

    events: list[TokenEvent]
    """One for each token; as many of the tokens that were computed are right."""

    accepted: int
    """Tokens of the draft that came."""

    problem: str | None
    """Why it gets none."""


class _Place(NamedTuple):
    """Where a token is chosen."""

    job: Job
    draft: Sequence[int]
    """The job's tokens are followed by these."""
    number: Drawn
    constraint: Constraint | None

    @property
    def previous(self) -> Sequence[int]:
        """Tokens of prompt and answer, for what asks for them."""
        if not self.draft or self.job.params.repetition_penalty == 1:
            return self.job.tokens
        return [*self.job.tokens, *self.draft]

    @property
    def answered(self) -> Mapping[int, int]:
        """How often the answer has each of its tokens, for what asks for it."""
        params = self.job.params
        if not self.draft or not (params.presence_penalty or params.frequency_penalty):
            return self.job.answered
        return self.job.answered + Counter(self.draft)


def verify(drafts: Mapping[Job, Sequence[int]], logits: Tensor) -> list[Verified]:
    """Give each request its next tokens: those of its draft that are right, and one more. `logits` [n, V]: of
    the newest token of the first request, then of its draft's; then those of the second."""
    places = [place for job, draft in drafts.items() for place in _places(job, draft)]
    finite = [isfinite(largest) for largest in logits.amax(-1).tolist()]
    allowed, problems = allowed_tokens([place.constraint for place in places], logits.shape[1], logits.device)
    choices = sample(
        logits if all(finite) else logits.nan_to_num(),
        [place.job.params for place in places],
        [place.number for place in places],
        [place.previous for place in places],
        [place.answered for place in places],
        allowed,
    )
    for row, (place, right) in enumerate(zip(places, finite, strict=True)):
        if not (right and place.job.prompt_is_finite):
            problems[row] = NOT_FINITE
    results, start = [], 0
    for job, draft in drafts.items():
        stop = start + len(draft) + 1
        end = next((row for row in range(start, stop) if row in problems), stop)
        results.append(_accept(job, draft, choices[start:end], problems.get(start)))
        start = stop
    return results


def _places(job: Job, draft: Sequence[int]) -> Iterator[_Place]:
    numbers = job.draws.ahead(len(draft) + 1)
    constraints: Iterable[Constraint | None] = [job.constraint] * len(numbers)
    if draft and job.constraint is not None:
        constraints = job.constraint.along(draft)
    for count, (number, constraint) in enumerate(zip(numbers, constraints, strict=True)):
        yield _Place(job, draft[:count], number, constraint)


def _accept(job: Job, draft: Sequence[int], choices: Sequence[Choice], problem: str | None) -> Verified:
    """The first `choices`, up to one that is not as drafted, or ends the answer."""
    events: list[TokenEvent] = []
    for choice, guess in zip(choices, [*draft, None], strict=False):
        if job.params.temperature > 0:
            job.draws.random()
        events.append(job.accept(choice))
        if choice.token != guess:
            return Verified(events, len(events) - 1, None)
        if events[-1].finish_reason is not None:
            break
    return Verified(events, len(events), problem)
