"""A whole KV policy: tokens at odd positions are forgotten once `age` tokens are behind them. See README.md."""

from dataclasses import dataclass
from typing import Literal

import torch

from lckv.attention.key_bias import HIDDEN, KeyBias
from lckv.policies.base import Extension, KeyValue, KVPolicy, Statistic
from lckv.policies.config import PolicyConfig, Traits


@dataclass(frozen=True)
class ForgetOddConfig(PolicyConfig):
    name: Literal["forget-odd"] = "forget-odd"
    age: int = 8
    traits = property(lambda self: Traits(KeyBias(self.age, extra_channels=8), windows=False))
    build = lambda self: ForgetOdd(self)  # noqa: E731


class ForgetOdd(KVPolicy):
    statistics = (Statistic("odd", "share of tokens at odd positions"),)

    def query(self, query, context):  # [s, b, h, d] to [s, b, h, d + 8]
        query = torch.nn.functional.pad(context.rotate(query), (0, 8))
        query[..., -1] = (query.shape[-1] - 8) ** 0.5  # attention divides by it
        return query

    def keys_values(self, key, value, query, context):  # [s, b, g, d]
        odd = (context.positions % 2).float()[..., None].expand(key.shape[:3])
        key = torch.nn.functional.pad(context.rotate(key), (0, 8))
        key[..., -1] = odd * HIDDEN  # seen by queries that are `age` tokens further on, or more
        return KeyValue(key, value), (odd.mean(0),)

    def extend(self, state, key, value, query, context):  # tells a cache what to drop
        counted = torch.ones_like(context.positions) if context.counted is None else context.counted
        first = context.positions.masked_fill(counted == 0, 2**40).amin(0)
        newest = first - self.config.age + torch.arange(self.config.age, device=key.device)[:, None]
        hides = (newest % 2 == 1)[..., None].expand(
            *newest.shape, key.shape[2]
        )  # of the cache's newest slots
        return Extension(*self.keys_values(key, value, query, context)[0], hides)
