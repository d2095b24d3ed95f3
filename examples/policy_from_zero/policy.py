"""A whole KV policy: tokens at odd positions go once `age` tokens are behind them. See README.md."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import pad

from lckv.attention.key_bias import HIDDEN, KeyBias
from lckv.policies.base import Extension, KeyValue, KVPolicy
from lckv.policies.config import PolicyConfig, Reach, Traits


@dataclass(frozen=True)
class ForgetOddConfig(PolicyConfig):
    name: Literal["forget-odd"] = "forget-odd"
    age: int = 8
    traits = property(lambda self: Traits(KeyBias(self.age, extra_channels=8), windows=False, reach=Reach()))

    def build(self):
        return ForgetOdd(self)


class ForgetOdd(KVPolicy):
    def query(self, query, context, kv_heads=None):  # [s, b, h, d] to [s, b, h, d + 8]
        query = pad(context.rotate(query), (0, 8))
        query[..., -1] = (query.shape[-1] - 8) ** 0.5  # attention divides by it
        return query

    def keys_values(self, key, value, query, context):  # [s, b, g, d]
        key = pad(context.rotate(key), (0, 8))
        key[..., -1] = (context.positions % 2)[..., None] * HIDDEN
        return KeyValue(key, value), ()

    def extend(self, state, key, value, query, context):  # tells a cache which of its newest slots go
        counted = torch.ones_like(context.positions) if context.counted is None else context.counted
        first = context.positions.masked_fill(counted == 0, 2**40).amin(0)
        newest = first - self.config.age + torch.arange(self.config.age, device=key.device)[:, None]
        hides = (newest % 2 == 1)[..., None].expand(*newest.shape, key.shape[2])  # [age, b, g]
        return Extension(*self.keys_values(key, value, query, context)[0], hides)
