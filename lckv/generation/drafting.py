"""Drafts: guesses of a request's next tokens, which the model then checks all at once.

Prompt lookup (Saxena 2023; Yang et al. 2023, "Inference with Reference") takes them from the text itself: the
place before that has the most in common with its end, and what came there. It costs no model and pays where
an answer repeats its prompt or itself: edited code, summaries, quotations.

    text     the red fox ran . and then the red fox      draft:  ran . and then the
             ^^^^^^^^^^^                ^^^^^^^^^^^
"""

from collections.abc import Sequence
from typing import Protocol

_PLACES = 16
"""Newest places that are compared with the end of the text."""

_LONGEST = 32
"""Tokens that are compared at each."""


class Drafter(Protocol):
    """Guesses for one request. It keeps what it needs of the text, which only grows."""

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """What may follow `tokens`, at most `most` tokens; none where there is no idea."""
        ...


class PromptLookup:
    """Implements `Drafter`. Its work per token does not grow with the text."""

    def __init__(self, least: int) -> None:
        """`least`: tokens that a place must have in common with the end of the text."""
        self._least = least
        self._newest: dict[tuple[int, ...], int] = {}
        """From `least` tokens to the newest place behind them."""
        self._before: list[int] = [0]
        """Of each place, up to the newest one that is known, the one before it behind the same tokens;
        0: there is none."""

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """See `Drafter`. The copy may reach into itself: abab goes on as ababab."""
        self._learn(tokens)
        place = self._best(tokens)
        copied = list(tokens[place : place + most]) if place else []
        while place and len(copied) < most:
            copied.append(copied[len(copied) - (len(tokens) - place)])
        return copied

    def _learn(self, tokens: Sequence[int]) -> None:
        """The places that have come, all of which have a token behind them."""
        for place in range(len(self._before), len(tokens)):
            name = tuple(tokens[max(0, place - self._least) : place])
            self._before.append(self._newest.get(name, 0))
            if len(name) == self._least:
                self._newest[name] = place

    def _best(self, tokens: Sequence[int]) -> int:
        """The place with the most in common with the end of the text, of several the newest; 0: none."""
        place = self._newest.get(tuple(tokens[-self._least :]), 0)
        best, longest = 0, 0
        for _ in range(_PLACES):
            if not place or longest == _LONGEST:
                break
            length = self._least
            while length < min(place, _LONGEST) and tokens[place - 1 - length] == tokens[-1 - length]:
                length += 1
            if length > longest:
                best, longest = place, length
            place = self._before[place]
        return best
