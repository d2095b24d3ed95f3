"""Attention to keys with a bias on their score, at the cost of plain causal flash attention.

The last channel of a key is its bias and the last channel of a query the constant that brings it to the
score, so any flash kernel adds it. But a query sees its newest w keys without bias. So keys are seen in two
parts, whose softmaxes are joined by their logsumexp (lse): those with bias by the kernel, which is again a
causal problem, w queries shorter; those without in another way. w is the age from which on keys carry their
bias; here it is 2:

    keys     0 1 2 3 4 5
    query 0  .                   .: the newest w keys
    query 1  . .
    query 2  b . .               b: the kernel, on queries w .. s - 1 and keys 0 .. s - 1 - w
    query 3  b b . .
    query 4  b b b . .
    query 5  b b b b . .

Where a query does not see itself, all of it lies one key further left: query t + 1 stands in the place of
query t. Where there are only the last q queries, the kernel's part has more keys than queries (`causal.py`).
Each part's backward is given the output and the lse of the whole softmax and so returns exactly the gradients
through its own keys. Nothing of size s x s is made.

The newest keys: one (w = 1) is a dot product for each query (`frontier.py`), more are a band (`band.py`), or
masks where the kernel takes some (`masked_band.py`).

Shapes: b rows, h query heads, g KV heads, s tokens, q <= s queries, d channels of a value, e extra channels
of queries and keys; query [b, h, q, d + e], key [b, g, s, d + e], value [b, g, s, d]."""

from dataclasses import replace
from functools import partial

from torch import Tensor

from lckv.attention.band import Banded
from lckv.attention.document_batches import attend_in_batches
from lckv.attention.flash_pair import FlashPair
from lckv.attention.frontier import attend_with_frontier
from lckv.attention.key_bias import KeyBias
from lckv.attention.masked_band import MaskedBand
from lckv.attention.pieces import Attention, attend_pieces, pieces_of
from lckv.attention.visibility import Visibility
from lckv.errors import UnsupportedError


def attend_biased(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    *,
    scale: float,
    dropout: float,
    key_bias: KeyBias,
    pair: FlashPair,
    masks: bool = False,
) -> Tensor:
    """Same contract as `reference.attend` with a key bias. `masks`: of a band, on PyTorch's kernel for CPUs,
    which takes masks and is not fast at triangles. Raises UnsupportedError for a window and for
    dropout, which it does not have."""
    if visibility.window is not None:
        asked = f"a sliding window of {visibility.window} tokens over keys that carry a bias"
        raise UnsupportedError(asked, "remove the window, or choose a KV policy without such keys")
    if dropout > 0:
        asked = f"dropout of {dropout} in attention to keys that carry a bias"
        raise UnsupportedError(asked, "it must be 0, or choose a KV policy without such keys")
    if key_bias.age == 1:
        return attend_with_frontier(query, key, value, visibility, scale, pair)
    width, documents = key_bias.age, visibility.documents
    attention = MaskedBand(width, scale) if masks else Banded(width, pair, scale)
    if documents is None or query.shape[2] < key.shape[2]:
        return attend_with_band(query, key, value, visibility, attention)
    rows = replace(visibility, documents=None)
    attend = partial(attend_with_band, visibility=rows, attention=attention)
    return attend_in_batches(attend, query, key, value, documents)


def attend_with_band(
    query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, attention: Attention
) -> Tensor:
    """[b, h, q, d]; 0 for queries that see nothing. Documents are attended one by one."""
    return attend_pieces(query, key, value, list(pieces_of(query, key, visibility)), attention)
