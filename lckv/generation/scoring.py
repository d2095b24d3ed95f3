"""How probable texts are, computed as a generation would: through the cache, in chunks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lckv.cache.paged import PagedCache
from lckv.generation.following import following
from lckv.generation.forward import Forward


class Scores(NamedTuple):
    """Of a text of n tokens."""

    logprobs: Tensor
    """float32 [n - 1] on the CPU: natural logarithm of the probability of each token but the first, given
    those before it."""

    greedy: Tensor
    """bool [n - 1] on the CPU: whether it is the most probable one."""


@torch.inference_mode()
def score(
    forward: Forward, cache: PagedCache, texts: Sequence[Sequence[int]], *, chunk: int, tokens_at_once: int
) -> list[Scores]:
    """Score `texts` through an empty `cache`, `chunk` tokens of each at a time; of several texts together at
    most `tokens_at_once`, padding included, as far as there is room. The longest come first.

    Raises OutOfPagesError for a text that finds no room alone.
    """
    scores_of: dict[int, Scores] = {}
    order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
    while order:
        width = min(chunk, len(texts[order[0]]))
        rows = max(1, min(tokens_at_once // width, cache.max_sequences, len(order)))
        sequences = [cache.open() for _ in range(rows)]
        try:
            # The last token of a text need not be computed.
            tokens = [len(texts[number]) - 1 for number in order[:rows]]
            while len(sequences) > 1 and cache.pages_needed(sequences, tokens) > cache.pages_free:
                cache.close(sequences.pop())
                tokens.pop()
            batch, order = order[: len(sequences)], order[len(sequences) :]
            scores = _score_together(forward, sequences, [texts[number] for number in batch], chunk)
            scores_of.update(zip(batch, scores, strict=True))
        finally:
            for sequence in sequences:
                cache.close(sequence)
    return [scores_of[number] for number in range(len(texts))]


def _score_together(
    forward: Forward, sequences: Sequence[int], texts: Sequence[Sequence[int]], chunk: int
) -> list[Scores]:
    """Of texts from the longest to the shortest."""
    parts: list[list[Scores]] = [[Scores(torch.empty(0), torch.empty(0, dtype=torch.bool))] for _ in texts]
    for start in range(0, len(texts[0]) - 1, chunk):
        chunks = [text[start : min(start + chunk, len(text) - 1)] for text in texts if len(text) - 1 > start]
        hidden_states = forward(sequences[: len(chunks)], chunks).hidden_states
        for row, tokens in enumerate(chunks):
            wanted = texts[row][start + 1 : start + 1 + len(tokens)]
            scored = following(forward.model.lm_head, hidden_states[row, : len(tokens)], wanted)
            parts[row].append(Scores(scored.logprobs.cpu(), scored.greedy.cpu()))
    return [Scores(*(torch.cat(pieces) for pieces in zip(*part, strict=True))) for part in parts]
