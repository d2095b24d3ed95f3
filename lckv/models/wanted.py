"""The tokens of a prompt whose results are wanted: the only ones for which layers above all keys and values
run (`lckv.sharing.early_exit`).

Shapes: b rows, s new tokens, q wanted ones of each row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lckv.attention.visibility import Documents
from lckv.models.tokens import Layout
from lckv.policies.base import TokenContext
from lckv.sharing.early_exit import Results


@dataclass(frozen=True, eq=False)
class Wanted:
    """Of new tokens those whose hidden states are wanted."""

    places: Tensor
    """int64 [b, q]: their columns."""

    context: TokenContext
    """What the KV policy is told of them."""

    document: Tensor | None
    """int64 [b, s]: the document of each new token; None: one and the same."""

    @classmethod
    def at(cls, places: Tensor, tokens: int, context: TokenContext, layout: Layout) -> "Wanted":
        """Those in columns `places`, of so many `tokens` with `context` and `layout`."""
        document = layout.document if layout.masked else _index(layout.documents, len(places), tokens)
        there = context.at(lambda tensor: _taken(tensor.transpose(0, 1), places).transpose(0, 1))
        return cls(places, there, document)

    def of(self, tensor: Tensor) -> Tensor:
        """[b, s, ...] to [b, q, ...]."""
        return _taken(tensor, self.places)


def newest_columns(new_tokens: Tensor, count: int) -> Tensor | None:
    """int64 [b, count]: the last columns of `new_tokens` [b, s, ...]; None where they are all, as for 0."""
    rows, tokens = new_tokens.shape[:2]
    if not 0 < count < tokens:
        return None
    return torch.arange(tokens - count, tokens, device=new_tokens.device).expand(rows, -1)


def check_needs(wanted: Tensor, *, all_tokens: bool) -> None:
    """Raises ValueError where something else needs the results of `all_tokens`."""
    if all_tokens:
        raise ValueError(
            f"wanted is a tensor {list(wanted.shape)}, the tokens that layers above all keys and values run "
            "for; hidden states of layers, and attention functions of others, need all tokens: leave one of "
            "them out."
        )


def results_of(wanted: Tensor | None) -> Results:
    """What a plan is to end with where columns `wanted` [b, q] are; None: all."""
    if wanted is None:
        return Results.ALL
    return Results.SOME if wanted.shape[1] else Results.NONE


def _taken(tensor: Tensor, places: Tensor) -> Tensor:
    """Of [b, s, ...] the columns `places` [b, q], as [b, q, ...]."""
    return tensor[torch.arange(len(places), device=places.device)[:, None], places]


def _index(documents: Documents | None, rows: int, tokens: int) -> Tensor | None:
    """int64 [b, s]: the number of each token's document."""
    if documents is None:
        return None
    starts = torch.zeros(rows * tokens, dtype=torch.int64, device=documents.cu_seqlens.device)
    return starts.index_fill_(0, documents.cu_seqlens[:-1].long(), 1).cumsum(0).view(rows, tokens)
