"""Forgets tokens by their positions; the bias is in a channel of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from lckv.attention.key_bias import HIDDEN
from lckv.policies.base import Extension, KeyValue, KVPolicy, Statistic, Statistics, TokenContext
from tests.policies.forgetful.config import ForgetfulConfig

_EXTRA = 8


class ForgetfulPolicy(KVPolicy):
    """See `ForgetfulConfig`. Its state holds, of the newest tokens of each head, which will be forgotten."""

    config: ForgetfulConfig
    statistics = (
        Statistic("forgotten", "share of tokens that will be forgotten"),
        Statistic("key_size", "mean square of keys"),
    )

    def query(self, query: Tensor, context: TokenContext, kv_heads: int | None = None) -> Tensor:
        """With the constant that attention's scale turns into 1."""
        wide = pad(context.rotate(query), (0, _EXTRA))
        wide[..., -1] = query.shape[-1] ** 0.5
        return wide

    def keys_values(
        self, key: Tensor, value: Tensor, query: Tensor | None, context: TokenContext
    ) -> tuple[KeyValue, Statistics]:
        """Every token carries its bias; attention decides from which age on."""
        forgotten = self._forgotten(context, key.shape[2])
        wide = pad(context.rotate(key), (0, _EXTRA))
        wide[..., -1] = forgotten * HIDDEN
        size = key.float().square().mean(-1)
        return KeyValue(wide, value), (context.mean(forgotten), context.mean(size))

    def extend(
        self, state: Tensor | None, key: Tensor, value: Tensor, query: Tensor | None, context: TokenContext
    ) -> Extension:
        """What will be hidden is known from the start."""
        if state is None:
            state = torch.zeros(self.config.age, *key.shape[1:3], 1, device=key.device)
        wide, value = self.keys_values(key, value, None, context)[0]
        everything = torch.cat((state, self._forgotten(context, key.shape[2])[..., None]))
        # The newest ones up to each row's last token; padding is on either side of the new ones.
        rows = torch.arange(key.shape[1], device=key.device)
        counted = torch.ones(key.shape[:2], dtype=torch.bool, device=key.device)
        if context.counted is not None:
            counted = context.counted
        order = pad(counted.int(), (0, 0, self.config.age, 0), value=1).argsort(dim=0, stable=True)
        return Extension(wide, value, state[..., 0] > 0, everything[order[-self.config.age :], rows])

    def auxiliary_loss(self, means: Sequence[Tensor], progress: float) -> Tensor:
        """For keys that are large."""
        return self.config.loss_weight * means[1]

    def report(self, means: Sequence[Tensor], loss: float, progress: float | None) -> dict[str, float]:
        """What stays, and the loss."""
        kept = {"kept": 1 - means[0].mean().item()}
        return kept if progress is None else {**kept, "forgetful_loss": loss}

    def _forgotten(self, context: TokenContext, heads: int) -> Tensor:
        """float32 [s, b, g]: 1 for tokens that will be forgotten."""
        assert context.positions is not None
        return (context.positions % self.config.stride != 0).float()[..., None].repeat(1, 1, heads)
