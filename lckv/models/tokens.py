"""From Hugging Face's masks and positions to what attention and KV policies need to know of the tokens.

Shapes: b rows, s new tokens, c columns of earlier calls.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lckv.attention.visibility import Documents
from lckv.cache.contiguous import ContiguousCache
from lckv.models.cache import CACHE_NAME
from lckv.models.packing import Packing
from lckv.policies.base import KVPolicy


class Layout(NamedTuple):
    """How the new tokens of a batch lie in its columns, and which columns they may see."""

    counted: Tensor | None = None
    """bool [b, s]: those that are not padding; None: all."""

    documents: Documents | None = None
    """Where rows are split; None: they are whole."""

    masked: bool = False
    """Whether there is padding that no splitting of rows hides: keys are masked one by one."""

    document: Tensor | None = None
    """int64 [b, s]: to which document each token belongs, where `masked`; None: all to one."""

    shown: Tensor | None = None
    """bool [b, c]: columns of the cache that may be seen; None: all."""


class Given(NamedTuple):
    """What a forward pass was told of its tokens."""

    attention_mask: Tensor | None
    """[b, c + s] of 0 and 1."""

    position_ids: Tensor | None
    """int64 [b or 1, s]."""

    packing: Packing

    def layout(
        self, new_tokens: Tensor, cache: ContiguousCache | None, policy: KVPolicy, *, training: bool
    ) -> Layout:
        """The layout of `new_tokens` [b, s, ...] behind those of `cache`.

        Raises ValueError for what does not fit the batch, contradicts the cache, or is impossible with the
        KV policy. In training padding behind a row's tokens is left to causality: nothing counts there."""
        rows, tokens = new_tokens.shape[:2]
        older = 0 if cache is None else cache.columns
        mask = _checked_mask(self.attention_mask, rows, tokens, older)
        _check_positions(self.position_ids, rows, tokens)
        starts = self.packing.starts(rows, tokens, new_tokens.device)
        if older and starts is not None:
            raise ValueError(
                f"{self.packing.given[0]} is given with {CACHE_NAME}, which holds {older} columns; packed "
                "sequences begin in a batch of their own: leave one of them out."
            )
        if torch.compiler.is_compiling() and policy.traits.keeps_every_token:
            return self._traced(mask, older, starts, rows)
        if cache is not None and older:
            return self._behind(mask, tokens, cache, policy)
        new = None if mask is None or bool(mask.all()) else mask
        if new is not None and _has_holes(new, policy, training=training):
            return Layout(new, None, True, _index(self._starts(new, starts, rows)))
        return Layout(new, documents_of(new, self._starts(new, starts, rows)))

    def positions(self, new_tokens: Tensor, counted: Tensor | None, cache: ContiguousCache | None) -> Tensor:
        """int64 [b or 1, s]: positions of `new_tokens` [b, s, ...] behind `cache`: those that were given,
        those in packed sequences, or else columns. `counted`: bool [b, s]; None: all."""
        if self.position_ids is not None:
            return self.position_ids
        rows, tokens = new_tokens.shape[:2]
        starts = self.packing.starts(rows, tokens, new_tokens.device)
        if starts is None:
            return _column_positions(new_tokens, counted, cache)
        places = torch.arange(starts.shape[1], device=starts.device)
        return places - torch.where(starts, places, 0).cummax(1).values

    def for_function(self) -> "Given":
        """What an attention function of others is told: of packed sequences by positions alone.

        Raises ValueError where it cannot be told of them, since there is a mask too."""
        if not self.packing.given:
            return self
        if self.attention_mask is not None:
            raise ValueError(
                f"{self.packing.given[0]} and attention_mask are both given to an attention function of "
                "others, which can be told of one only: leave one of them out."
            )
        return self._replace(position_ids=None)

    def _starts(self, new: Tensor | None, packed: Tensor | None, rows: int) -> Tensor | None:
        """bool [b, s]: tokens that begin a sequence of a row; None: nothing says so."""
        restarts = None if self.position_ids is None else (self.position_ids == 0).expand(rows, -1)
        if restarts is not None and new is not None:
            restarts = restarts & new
        if packed is None or restarts is None:
            return restarts if packed is None else packed
        other = restarts & ~packed
        if not torch.compiler.is_compiling() and bool(other.any()):
            row, column = other.nonzero()[0].tolist()
            raise ValueError(
                f"position_ids: row {row} restarts from 0 at column {column}, where {self.packing.given[0]} "
                "lets no sequence begin; make them agree, or leave one of them out."
            )
        return packed

    def _traced(self, mask: Tensor | None, older: int, packed: Tensor | None, rows: int) -> Layout:
        """Without looking at values, for `torch.export` and `torch.compile`."""
        new = None if mask is None else mask[:, older:]
        starts = None if older else self._starts(new, packed, rows)
        shown = mask[:, :older] if mask is not None and older else None
        return Layout(new, None, new is not None or starts is not None, _index(starts), shown)

    def _behind(self, mask: Tensor | None, tokens: int, cache: ContiguousCache, policy: KVPolicy) -> Layout:
        """Of tokens behind those of a cache. Decoding looks at values on the host once per step, and not at
        all without a mask."""
        older = cache.columns
        if mask is None and (tokens == 1 or self.position_ids is None):
            return Layout()
        if mask is None:
            mask = torch.ones(len(cache.seen), older + tokens, dtype=torch.bool, device=cache.seen.device)
        elif cache.counted is None and self._all_follow(mask):
            return Layout()
        new, old = mask[:, older:], mask[:, :older]
        stored = torch.ones_like(old) if cache.counted is None else cache.counted
        if self.attention_mask is None:
            old = stored
        hidden, revealed = stored & ~old, old & ~stored
        again = self._restarts(new, (stored & old).any(1))
        flags = torch.stack((new.all(), hidden.any(), revealed.any(), again.any()))
        whole, hides, reveals, restarts = flags.tolist()
        if reveals:
            raise ValueError(
                f"attention_mask shows {_place(revealed)}, which was padding when it came, so that "
                f"{CACHE_NAME} holds nothing of it: give 0 there, or start again without {CACHE_NAME}."
            )
        if restarts:
            raise ValueError(
                f"position_ids: {_place(again)} of the new tokens begins another sequence at position 0, but "
                f"{CACHE_NAME} holds tokens of the row that the attention_mask shows; hide them, count on "
                f"from them, or start without {CACHE_NAME}."
            )
        if hides and not policy.traits.keeps_every_token:
            raise ValueError(
                f"attention_mask hides {_place(hidden)}, which {CACHE_NAME} holds; the KV policy "
                f"{policy.name} merges or drops tokens, so that no single one can be hidden any more: give 1 "
                f"there, or start again without {CACHE_NAME}."
            )
        if not whole and not policy.traits.keeps_every_token:
            _has_holes(new, policy, training=False)
        return Layout(None if whole else new, shown=old if hides else None)

    def _all_follow(self, mask: Tensor) -> bool:
        """Whether there is neither padding nor a sequence that begins."""
        follow = mask.all()
        return bool(follow if self.position_ids is None else follow & (self.position_ids != 0).all())

    def _restarts(self, new: Tensor, sees_older: Tensor) -> Tensor:
        """bool [b, s]: tokens that begin a sequence although their row has begun one."""
        if self.position_ids is None:
            return torch.zeros_like(new)
        begins = (self.position_ids == 0) & new
        return begins & (sees_older[:, None] | (begins.cumsum(1) > 1))


def documents_of(counted: Tensor | None, begins: Tensor | None) -> Documents | None:
    """Rows split where padding ends and where sequences begin; None: rows are whole.

    Both are bool [b, s]; None: no padding, nothing begins inside a row.
    """
    if counted is None and begins is None:
        return None
    if counted is None:
        assert begins is not None
        starts = begins.clone()
    else:
        starts = _begins(counted)
        if begins is not None:
            starts |= counted & begins
    starts[:, 0] = True
    first = starts.flatten().nonzero().squeeze(1)
    if len(first) == len(starts):
        return None
    end = torch.tensor([starts.numel()], device=first.device)
    return Documents(torch.cat((first, end)).to(torch.int32))


def positions(
    counted: Tensor | None, seen: Tensor | None, rows: int, tokens: int, device: torch.device
) -> Tensor:
    """int64 [b, s]: positions of new tokens behind `seen` [b] older ones; of padding, something in range."""
    every = torch.ones(rows, tokens, dtype=torch.bool, device=device) if counted is None else counted
    new = (every.cumsum(1) - 1).clamp(min=0)
    return new if seen is None else new + seen[:, None]


def _column_positions(new_tokens: Tensor, counted: Tensor | None, cache: ContiguousCache | None) -> Tensor:
    """int64 [b or 1, s]: positions of `new_tokens` [b, s, ...] behind `cache` that nobody gave: as in Llama
    their columns, but counted from the first column in which each row has a token.

    Distances are what rotation goes by; small positions are more exact. `counted`: bool [b, s]; None: all."""
    rows, tokens = new_tokens.shape[:2]
    older, before = (0, None) if cache is None else (cache.columns, cache.counted)
    columns = torch.arange(older, older + tokens, device=new_tokens.device)[None]
    if counted is None and before is None:
        return columns
    known = [
        torch.ones(rows, width, dtype=torch.bool, device=new_tokens.device) if part is None else part
        for part, width in ((before, older), (counted, tokens))
    ]
    leading = (torch.cat(known, 1).cumsum(1) == 0).sum(1, keepdim=True)
    return (columns - leading).clamp(min=0)


def _checked_mask(attention_mask: Any, rows: int, tokens: int, older: int) -> Tensor | None:
    """bool [b, older + s]."""
    if attention_mask is None:
        return None
    required = (
        f"it must be [{rows}, {older + tokens}], with 1 for tokens and 0 for padding, for {older} earlier "
        f"columns and {tokens} new ones. Which key a query sees follows from the sharing map."
    )
    if not isinstance(attention_mask, Tensor):
        raise ValueError(f"attention_mask is a {type(attention_mask).__name__}; {required}")
    if tuple(attention_mask.shape) != (rows, older + tokens):
        raise ValueError(f"attention_mask has shape {list(attention_mask.shape)}; {required}")
    if attention_mask.is_floating_point() and not torch.compiler.is_compiling():
        other = (attention_mask != 0) & (attention_mask != 1)
        if bool(other.any()):
            raise ValueError(f"attention_mask has the value {attention_mask[other][0].item():g}; {required}")
    return attention_mask.bool()


def _check_positions(position_ids: Tensor | None, rows: int, tokens: int) -> None:
    if position_ids is not None and tuple(position_ids.shape) not in ((rows, tokens), (1, tokens)):
        raise ValueError(
            f"position_ids has shape {list(position_ids.shape)}; it must be [{rows}, {tokens}], the position "
            "of each new token."
        )


def _has_holes(new: Tensor, policy: KVPolicy, *, training: bool) -> bool:
    """Whether padding of `new` is to be masked key by key. Raises ValueError for padding between tokens where
    the KV policy has no meaning for it."""
    between = _begins(new).sum(1) > 1
    if not policy.traits.keeps_every_token:
        if bool(between.any()):
            raise ValueError(
                f"attention_mask: row {int(between.nonzero()[0])} has padding between its tokens; the KV "
                f"policy {policy.name} merges or drops neighbouring tokens, which there are none of then: "
                "put padding before or after a row's tokens."
            )
        return False
    if training:
        return bool(between.any())
    return bool((~new & (new.cumsum(1) > 0)).any())


def _begins(counted: Tensor) -> Tensor:
    """bool [b, s]: tokens behind padding, or at the start of the row."""
    return counted & ~pad(counted[:, :-1], (1, 0))


def _index(starts: Tensor | None) -> Tensor | None:
    return None if starts is None else starts.cumsum(1)


def _place(wrong: Tensor) -> str:
    row, column = wrong.nonzero()[0].tolist()
    return f"column {column} of row {row}"
