"""How probable texts are, computed as a generation would: through the cache, in chunks.

What several texts begin with is computed once. Texts are cut where they part, and the pieces make a tree:

    What is 2 + 2? A  ┐                         A     a snapshot of the cache is taken where a piece ends,
    What is 2 + 2? B  ├  What is ── 2 + 2? ──┬  B     and the pieces behind it begin from there
    What is 3 + 5? C  ┘            └ 3 + 5?  ──  C

The last token of a text need not be computed; so pieces of one token, as the answers of multiple choice often
are, cost nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lckv.cache.paged import OutOfPagesError, PagedCache, Snapshot
from lckv.generation.following import following
from lckv.generation.forward import Forward
from lckv.generation.prefixes import Prefixes, common_tokens


class Scores(NamedTuple):
    """Of a text of n tokens."""

    logprobs: Tensor
    """float32 [n - 1] on the CPU: natural logarithm of the probability of each token but the first, given
    those before it."""

    greedy: Tensor
    """bool [n - 1] on the CPU: whether it is the most probable one."""


_NOTHING = Scores(torch.empty(0), torch.empty(0, dtype=torch.bool))


@dataclass(eq=False)
class _Border:
    """Where pieces part."""

    snapshot: Snapshot
    waiting: int
    """Pieces that are still to begin here."""


@dataclass(frozen=True, eq=False)
class _Piece:
    """Tokens that some texts have in common, behind a piece that more of them do."""

    texts: Sequence[int]
    """Numbers of the texts, in the order of their tokens."""

    start: int
    """Tokens before it."""

    stop: int
    """Tokens up to its end, which are to be computed."""

    border: _Border | None = None
    """Where it begins; None: at the beginning."""

    @property
    def tokens(self) -> int:
        """Of it."""
        return self.stop - self.start

    @property
    def origin(self) -> tuple[Snapshot | None, int]:
        """What the cache begins it from, and with how many tokens."""
        return (None if self.border is None else self.border.snapshot), self.start


def score(
    forward: Forward,
    cache: PagedCache,
    prefixes: Prefixes,
    texts: Sequence[Sequence[int]],
    *,
    chunk: int,
    tokens_at_once: int,
) -> list[Scores]:
    """Score `texts` through a cache in which no sequence is open, `chunk` tokens of each at a time; of
    several texts together at most `tokens_at_once`, padding included, as far as there is room. `prefixes` are
    not read; they make room.

    Raises OutOfPagesError for a text that finds no room alone.
    """
    return _Scoring(forward, cache, prefixes, texts, chunk, tokens_at_once).run()


class _Scoring:
    """See `score`."""

    def __init__(
        self,
        forward: Forward,
        cache: PagedCache,
        prefixes: Prefixes,
        texts: Sequence[Sequence[int]],
        chunk: int,
        tokens_at_once: int,
    ) -> None:
        self._forward, self._cache, self._prefixes = forward, cache, prefixes
        self._texts, self._chunk, self._tokens_at_once = texts, chunk, tokens_at_once
        self._parts: list[list[Scores]] = [[_NOTHING] for _ in texts]
        # Pieces to come; those at the end are next, so that few borders are kept.
        self._pieces: list[_Piece] = []
        self._borders: list[_Border] = []

    @torch.inference_mode()
    def run(self) -> list[Scores]:
        order = sorted(range(len(self._texts)), key=lambda number: tuple(self._texts[number]))
        self._add([piece for piece in self._pieces_of(order, 0) if piece.tokens])
        try:
            while self._pieces:
                self._compute(self._next_pieces())
        finally:
            for border in self._borders:
                self._cache.drop(border.snapshot)
        return [Scores(*(torch.cat(part) for part in zip(*parts, strict=True))) for parts in self._parts]

    def _pieces_of(self, texts: Sequence[int], start: int) -> Iterator[_Piece]:
        """The next pieces of texts, in the order of their tokens, that begin with the same `start` tokens.
        What is shorter than a page is not shared."""
        groups = [texts] if texts else []
        while groups:
            group = groups.pop()
            first, last = (self._texts[group[place]] for place in (0, -1))
            common = len(first) if len(group) == 1 else common_tokens(first, last)
            if common == len(last) or common >= start + self._cache.page_size:
                # The last token of all need not be computed.
                yield _Piece(group, start, min(common, len(last) - 1))
                continue
            by_next_token: dict[int | None, list[int]] = {}
            for number in group:
                text = self._texts[number]
                by_next_token.setdefault(text[common] if len(text) > common else None, []).append(number)
            groups += by_next_token.values()

    def _add(self, pieces: list[_Piece]) -> None:
        """Let pieces come next, the longest first."""
        self._pieces += sorted(pieces, key=lambda piece: piece.tokens)

    def _next_pieces(self) -> list[_Piece]:
        """As many as go together."""
        batch: list[_Piece] = []
        width = pages = 0
        while self._pieces and len(batch) < self._cache.max_sequences:
            piece = self._pieces[-1]
            width = max(width, min(self._chunk, piece.tokens))
            pages += self._cache.pages_to_begin(piece.tokens, *piece.origin)
            fits = self._prefixes.make_room(pages)
            if batch and (not fits or width * (len(batch) + 1) > self._tokens_at_once):
                break
            if not fits:  # but for tokens that are merged
                self._prefixes.clear()
            batch.append(self._pieces.pop())
        return sorted(batch, key=lambda piece: -piece.tokens)

    def _compute(self, pieces: Sequence[_Piece]) -> None:
        """Compute pieces, from the longest to the shortest, and let those behind them come next."""
        sequences = [self._cache.open(*piece.origin) for piece in pieces]
        try:
            for piece in pieces:
                self._leave(piece)
            self._score_together(pieces, sequences)
            for piece, sequence in zip(pieces, sequences, strict=True):
                longer = [number for number in piece.texts if len(self._texts[number]) > piece.stop]
                behind = [
                    next_piece for next_piece in self._pieces_of(longer, piece.stop) if next_piece.tokens
                ]
                if behind:
                    border = _Border(self._cache.keep(sequence), len(behind))
                    self._borders.append(border)
                    self._add([replace(next_piece, border=border) for next_piece in behind])
        except OutOfPagesError:
            if not self._borders:
                raise
            # Without what the borders hold there may be room, when all other pieces are done.
            texts = [number for piece in pieces for number in piece.texts]
            self._pieces[:0] = [_Piece([number], 0, len(self._texts[number]) - 1) for number in texts]
            for number in texts:
                self._parts[number] = [_NOTHING]
        finally:
            for sequence in sequences:
                self._cache.close(sequence)

    def _leave(self, piece: _Piece) -> None:
        """A piece has begun and needs its border no more; nobody does who is the last one."""
        border = piece.border
        if border is None:
            return
        border.waiting -= 1
        if border.waiting == 0:
            self._borders.remove(border)
            self._cache.drop(border.snapshot)

    def _score_together(self, pieces: Sequence[_Piece], sequences: Sequence[int]) -> None:
        parts: list[list[Scores]] = [[] for _ in pieces]
        ends: list[Tensor] = [torch.empty(0)] * len(pieces)
        for start in range(0, pieces[0].tokens, self._chunk):
            chunks = [
                self._texts[piece.texts[0]][
                    piece.start + start : min(piece.start + start + self._chunk, piece.stop)
                ]
                for piece in pieces
                if piece.tokens > start
            ]
            hidden_states = self._forward(sequences[: len(chunks)], chunks).hidden_states
            assert hidden_states is not None
            for row, tokens in enumerate(chunks):
                logits = self._forward.model.lm_head(hidden_states[row, : len(tokens)]).float()
                first = pieces[row].start + start + 1
                wanted = self._texts[pieces[row].texts[0]][first : min(first + len(tokens), pieces[row].stop)]
                parts[row].append(_scores(logits[: len(wanted)], wanted))
                ends[row] = logits[-1:]
        for piece, part, end in zip(pieces, parts, ends, strict=True):
            longer = [number for number in piece.texts if len(self._texts[number]) > piece.stop]
            wanted = [self._texts[number][piece.stop] for number in longer]
            last = _scores(end.expand(len(longer), -1), wanted)
            for number in piece.texts:
                self._parts[number] += part
            for place, number in enumerate(longer):
                self._parts[number].append(Scores(*(numbers[place : place + 1] for numbers in last)))


def _scores(logits: Tensor, tokens: Sequence[int]) -> Scores:
    """Of the tokens that follow, from float32 logits [n, V]."""
    scored = following(logits, tokens)
    return Scores(scored.logprobs.cpu(), scored.greedy.cpu())
