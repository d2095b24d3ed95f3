"""A request on its way through the engine: what it has, what is computed, and what it hands out."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lckv.generation.constraints import Constraint
from lckv.generation.detokenize import AnswerText, TokenTexts
from lckv.generation.drafting import Drafter
from lckv.generation.draws import Draws
from lckv.generation.requests import Completion, FinishReason, Request, TokenEvent
from lckv.generation.sampling import Choice


class Job:
    """State of one request. Only the thread that runs the engine's step changes it."""

    def __init__(
        self, request: Request, texts: TokenTexts | None, *, ends: frozenset[int], max_tokens: int
    ) -> None:
        """`texts`: None for an answer without text. `ends`: tokens that end the answer; `max_tokens`: of
        prompt and answer together."""
        self.request, self.params = request, request.params
        self.tokens = list(request.prompt_ids)
        """Of prompt and answer."""
        self.answered: Counter[int] = Counter()
        """How often the answer has each of its tokens."""
        self.constraint: Constraint | None = None
        """What its answer must be, and how far it is; a preemption leaves it as it is."""
        self.sequence: int | None = None
        """Its number in the cache while it runs."""
        self.computed = 0
        """Tokens that the cache has taken in."""
        self.one_by_one = False
        """Whether its tokens are to be computed one at a time, because a chunk of them found no room."""
        self.cached_tokens: int | None = None
        """Tokens of the prompt that were found computed when it ran first; None before."""
        self.kept = 0
        """Tokens that were computed when its beginning was kept last."""
        self.stops: set[int] = set()
        """After so many tokens its beginning is to be kept, for others that wait for it."""
        self.follows: tuple[Job, int] | None = None
        """While it waits: the request that computes what this one begins with, and so many tokens."""
        self.may_follow = True
        """Whether it may wait for such a request; it waits for one at most."""
        self.preemptions = 0
        self.prefill_passes: int | None = None
        self.finish_reason: FinishReason | None = None
        self.draws = Draws(request.params.seed)
        """Of its tokens, unless it is greedy."""
        self.drafter: Drafter | None = None
        """Guesses its next tokens; None: nobody does."""
        self._ends, self._max_tokens = ends, max_tokens
        self._text = None if texts is None else self._answer_text(texts)
        self._texts: list[str] = []
        self._characters = 0
        self._choices: list[Choice] = []
        self._stopped_by: str | int | None = None
        self._prompt: list[Choice] = []
        self.prompt_is_finite = True
        """Whether all log-probabilities of the prompt's tokens are numbers."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def reusable(self) -> int:
        """Most of its tokens that need not be computed, if the cache has them: the logits of the last one are
        wanted, and those of a prompt whose log-probabilities are."""
        most = len(self.tokens) - 1
        if self.params.prompt_logprobs is None or len(self._prompt) == self.prompt_tokens - 1:
            return most
        return min(most, len(self._prompt))

    @property
    def sequence_number(self) -> int:
        """`sequence` of one that runs."""
        assert self.sequence is not None
        return self.sequence

    def begin(self, sequence: int, tokens: int) -> None:
        """Run as a sequence of the cache, which holds the first `tokens` already."""
        self.sequence, self.computed, self.kept = sequence, tokens, tokens
        self.follows, self.may_follow = None, False
        if self.cached_tokens is None:
            self.cached_tokens = tokens

    def preempt(self) -> None:
        """Forget what was computed; tokens, random numbers and drafter stay."""
        self.sequence, self.computed, self.kept, self.one_by_one = None, 0, 0, False
        self.preemptions += 1

    @property
    def answers(self) -> bool:
        """Whether nothing but its newest token, which is one of the answer, is to be computed."""
        return self.prompt_tokens <= self.computed == len(self.tokens) - 1

    def draft(self, most: int) -> list[int]:
        """Guesses of its next tokens that it could get, and not as the last ones; at most `most`."""
        room = min(most, self._max_tokens - len(self.tokens) - 1)
        if self.drafter is None or room < 1:
            return []
        drafted = self.drafter.draft(self.tokens, room)
        stop = next((place for place, token in enumerate(drafted) if token in self._ends), len(drafted))
        if self.constraint is not None:
            stop = min(stop, self.constraint.fitting(drafted[:stop]))
        return drafted[:stop]

    def unscored(self, count: int) -> range:
        """Places, among the next `count` tokens to compute, that a token of the prompt follows whose
        log-probability is not known yet."""
        return range(
            max(self.computed, len(self._prompt)), min(self.computed + count, self.prompt_tokens - 1)
        )

    def add_prompt(self, choices: Sequence[Choice], *, finite: bool) -> None:
        """The prompt's next tokens with their log-probabilities, after those of earlier calls."""
        self._prompt += choices
        self.prompt_is_finite &= finite

    def accept(self, choice: Choice) -> TokenEvent:
        """Take the next token, which may be the last. A request that wants none ends without it."""
        if self.params.max_new_tokens == 0:
            return self.end("length")
        self.tokens.append(choice.token)
        self.answered[choice.token] += 1
        self._choices.append(choice)
        text = ""
        if choice.token in self._ends:
            self.finish_reason, self._stopped_by = "stop", choice.token
        elif self._text is not None:
            text = self._text.add(choice.token)
        if self.constraint is not None and self.constraint.advance(choice.token):
            self.finish_reason = "stop"
        if self.finish_reason is None and len(self.tokens) >= self._max_tokens:
            self.finish_reason = "length"
        return self._event(choice, text)

    def end(self, reason: FinishReason) -> TokenEvent:
        """End without a token."""
        self.finish_reason = reason
        return self._event(None, "")

    def completion(self, error: str | None = None) -> Completion:
        """The finished answer."""
        assert self.finish_reason is not None
        wants = self.params.logprobs is not None
        return Completion(
            self.request.request_id,
            tuple(self.tokens[self.prompt_tokens :]),
            "".join(self._texts),
            self.finish_reason,
            self.prompt_tokens,
            tuple(choice.logprob or 0.0 for choice in self._choices) if wants else None,
            tuple(choice.top_logprobs for choice in self._choices) if wants else None,
            self._stopped_by,
            error,
            self.preemptions,
            self.prefill_passes,
            self.cached_tokens or 0,
            self._prompt_logprobs(),
        )

    def _answer_text(self, texts: TokenTexts) -> AnswerText:
        params = self.request.params
        return AnswerText(texts, params.stop, self.request.prompt_ids, params.visible_tokens)

    def _prompt_logprobs(self) -> tuple[Choice, ...] | None:
        """None where they are not wanted, or not all are there."""
        complete = len(self._prompt) == self.prompt_tokens - 1
        return tuple(self._prompt) if complete and self.params.prompt_logprobs is not None else None

    def _event(self, choice: Choice | None, text: str) -> TokenEvent:
        if self._text is not None:
            if self.finish_reason is not None and self._text.stopped_by is None:
                text += self._text.flush()
            if self._text.stopped_by is not None and self.finish_reason not in ("cancelled", "error"):
                self.finish_reason, self._stopped_by = "stop", self._text.stopped_by
        offset, first = self._characters, not self._texts
        self._texts.append(text)
        self._characters += len(text)
        details: dict[str, Any] = (
            {} if choice is None else {"logprob": choice.logprob, "top_logprobs": choice.top_logprobs}
        )
        return TokenEvent(
            self.request.request_id,
            None if choice is None else choice.token,
            text,
            offset,
            self.finish_reason,
            prompt_logprobs=self._prompt_logprobs() if first else None,
            cached_tokens=self.cached_tokens or 0,
            **details,
        )
