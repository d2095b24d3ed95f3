"""Random layers for tests of the DMC policy: queries, keys and values before RoPE, and what is known of their
tokens."""

from functools import partial

import torch
from torch import Tensor

from lckv.attention import reference, sdpa
from lckv.attention.key_bias import KeyBias
from lckv.attention.visibility import Documents, Visibility
from lckv.policies.base import KeyValue, TokenContext
from lckv.rope import Rotation, inverse_frequencies, rotate, rotation

BIAS = KeyBias(age=1)


def layer(
    length: int, rows: int = 2, kv_heads: int = 2, group: int = 2, channels: int = 8, *, spread: float = 3.0
) -> list[Tensor]:
    """Leaves query [s, b, h, d], key and value [s, b, g, d]; decision logits lie `spread` around 0, none of
    them near 0."""
    generator = torch.Generator().manual_seed(length * 1000 + kv_heads * 10 + group)
    heads = kv_heads * group, kv_heads, kv_heads
    query, key, value = (torch.randn(length, rows, n, channels, generator=generator) for n in heads)
    logits = spread * torch.randn(length, rows, kv_heads, generator=generator)
    key[..., -1] = 5.0 + logits + 0.01 * logits.sign()
    query[..., -1] -= 5.0
    return [tensor.requires_grad_() for tensor in (query, key, value)]


def angles(positions: Tensor, channels: int) -> Rotation:
    """RoPE at positions [s, b]."""
    return rotation(positions[..., None], inverse_frequencies(channels, 10000.0))


def context(length: int, rows: int, channels: int = 8, *, start: int = 0, **facts: object) -> TokenContext:
    """Of tokens at positions start .. start + length - 1 of every row."""
    positions = torch.arange(start, start + length)[:, None].expand(length, rows)
    return TokenContext(partial(rotate, angles=angles(positions, channels)), **facts)


def attend(
    query: Tensor,
    key_value: KeyValue,
    visibility: Visibility | None = None,
    *,
    key_bias: KeyBias | None = BIAS,
    plain: bool = False,
) -> Tensor:
    """[s, b, h, d] from [s, b, heads, d], on the plain oracle or the fast backend."""
    heads = (tensor.permute(1, 2, 0, 3) for tensor in (query, *key_value))
    backend = reference if plain else sdpa
    output = backend.attend(
        *heads, visibility or Visibility(), scale=query.shape[-1] ** -0.5, key_bias=key_bias
    )
    return output.permute(2, 0, 1, 3)


def documents_of(lengths: list[list[int]]) -> Documents:
    """Documents of these lengths, a list for each row."""
    flat = [0] + [length for row in lengths for length in row]
    return Documents(torch.tensor(flat).cumsum(0).to(torch.int32))
