"""Answers that follow a grammar: which tokens may come next in each.

Shapes: b rows, r of them with a grammar, V tokens of the vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Constraint:
    """A grammar, and where one answer is in it."""

    def __init__(self, matcher: Any) -> None:
        """`matcher`: llguidance's."""
        self._matcher = matcher

    def allowed(self) -> bytes:
        """A bit for each token, the lowest of a byte first: whether it may come next."""
        return bytes(self._matcher.compute_bitmask())

    def problem(self) -> str | None:
        """Why the grammar cannot be followed any more."""
        return self._matcher.get_error().partition("\n")[0] if self._matcher.is_error() else None

    def fitting(self, tokens: Sequence[int]) -> int:
        """How many of `tokens` the answer could go on with."""
        return int(self._matcher.validate_tokens(list(tokens)))

    def along(self, tokens: Sequence[int]) -> Iterator["Constraint"]:
        """Where the answer is, and where it would be after each of `tokens`, which fit."""
        matcher = self._matcher
        yield self
        for token in tokens:
            matcher = matcher.deep_copy()
            matcher.consume_token(token)
            yield Constraint(matcher)

    def advance(self, token: int) -> bool:
        """Take the answer's next token; whether the answer is complete and cannot go on."""
        return bool(self._matcher.consume_token(token) and self._matcher.is_stopped())


class AllowedTokens(NamedTuple):
    """What rows with a grammar may choose from."""

    rows: Tensor
    """int64 [r]: their numbers."""

    tokens: Tensor
    """bool [r, V]."""

    def apply(self, scores: Tensor) -> Tensor:
        """Scores [b, V] with -inf for what is not allowed; those of other rows as they were."""
        own = scores[self.rows].masked_fill(~self.tokens, -torch.inf)
        return scores.index_copy(0, self.rows, own)


def allowed_tokens(
    constraints: Sequence[Constraint | None], vocabulary: int, device: torch.device
) -> tuple[AllowedTokens | None, dict[int, str]]:
    """For the next token of each row: what those with a grammar may choose from (None: there are none), and
    what is wrong with those that can choose nothing, by their numbers."""
    rows, masks, problems = [], [], {}
    for row, constraint in enumerate(constraints):
        if constraint is None:
            continue
        mask = constraint.allowed()
        if (problem := constraint.problem()) is not None or not any(mask):
            problems[row] = f"the answer cannot follow its grammar: {problem or 'no token is allowed'}"
        else:
            rows.append(row)
            masks.append(mask)
    if not rows:
        return None, problems
    packed = torch.frombuffer(bytearray(b"".join(masks)), dtype=torch.uint8).view(len(rows), -1).to(device)
    bits = torch.arange(8, dtype=torch.uint8, device=device)
    # [r, bytes] -> [r, bytes, 8 bits] -> [r, V]
    tokens = (packed[:, :, None] >> bits & 1).view(len(rows), -1)[:, :vocabulary].bool()
    return AllowedTokens(torch.tensor(rows, device=device), tokens), problems
