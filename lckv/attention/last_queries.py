"""Attention of the last tokens of each row to all of them: keys are longer than queries.

Shapes: b rows, h query heads, g KV heads, s tokens, of which the last q < s have queries.
"""

from dataclasses import replace

from torch import Tensor
from torch.nn.functional import pad

from lckv.attention.causal import Causal, attend_causal
from lckv.attention.flash_pair import FlashPair
from lckv.attention.sequences import layout_of
from lckv.attention.visibility import Visibility
from lckv.errors import UnsupportedError


def attend_last(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    *,
    scale: float,
    dropout: float,
    pair: FlashPair,
) -> Tensor:
    """Same contract as `reference.attend` without bias and without a window that hides keys, also for as many
    queries as keys. Raises UnsupportedError for dropout, which parts that are joined do not have."""
    if dropout > 0:
        asked = f"dropout of {dropout} in attention of {query.shape[2]} queries to {key.shape[2]} keys"
        raise UnsupportedError(asked, "it must be 0 where keys are longer than queries")
    sizes, behind = (len(key), key.shape[2], query.shape[2]), int(visibility.exclude_self)
    layout = layout_of(visibility.documents, *sizes, behind)
    return attend_causal(query, key, value, Causal(pair, scale, layout))


def within_window(
    query: Tensor, key: Tensor, value: Tensor, visibility: Visibility
) -> tuple[Tensor, Tensor, Tensor, Visibility]:
    """The tokens that the queries see through their window, with as many queries as keys: min(window - 1, s -
    q) zeros stand in front of the queries. Of attention to these, the last q tokens are the queries'."""
    assert visibility.window is not None
    length, documents = key.shape[2], visibility.documents
    lead = min(visibility.window - 1, length - query.shape[2])
    first = length - query.shape[2] - lead
    if documents is not None:
        documents = documents.cut(length, (first, length))
    seen = pad(query, (0, 0, lead, 0)), key[:, :, first:], value[:, :, first:]
    return *seen, replace(visibility, documents=documents)
