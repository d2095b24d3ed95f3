"""Decoding: the slots of one layer, token by token.

Does one after the other what `DMCPolicy.keys_values` does in parallel with hard decisions, and keeps only the slots,
not the tokens: every KV head of every row has as many as its decisions opened.

Shapes: b rows, g KV heads, h query heads, d channels, n slots.
"""

import torch
from torch import Tensor

from lckv.policies.base import Slots, TokenContext
from lckv.policies.dmc.decisions import decision_logits
from lckv.policies.dmc.policy import DMCPolicy, rotate_without_last


class DMCSlots:
    """Slots that grow; a query sees all of those in use, its own included once `update` has been called for its
    token."""

    def __init__(
        self,
        policy: DMCPolicy,
        *,
        rows: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        capacity: int = 16,
    ) -> None:
        """`capacity`: slots per row and head to start with; it doubles when the fullest head needs more."""
        self._policy, self._window = policy, policy.config.window
        self._key, self._value = (
            torch.zeros(capacity, rows, kv_heads, head_dim, dtype=dtype, device=device) for _ in range(2)
        )
        self._lengths = torch.zeros(rows, kv_heads, dtype=torch.int64, device=device)
        self._longest = 0  # an upper bound, so that lengths are fetched from the device only when they might matter
        self._members = torch.zeros_like(self._lengths)
        # Weighted key, value and weight of the newest W tokens of each head's last slot; without a window their sum.
        places = 1 if self._window is None else self._window
        self._recent = torch.zeros(places, rows, kv_heads, 2 * head_dim + 1, device=device)

    @property
    def slots(self) -> Slots:
        """All slots; what is in them changes with the next update."""
        return Slots(self._key, self._value, self._lengths)

    @property
    def members(self) -> Tensor:
        """int64 [b, g]: tokens merged in the last slot of each head."""
        return self._members

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        tensors = (self._key, self._value, self._lengths, self._members, self._recent)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def reset(self, rows: Tensor) -> None:
        """Forget the slots of `rows` (bool [b]), whose next token begins a document."""
        for tensor in (self._key, self._value, self._recent):
            tensor.masked_fill_(rows[:, None, None], 0)
        for tensor in (self._lengths, self._members):
            tensor.masked_fill_(rows[:, None], 0)

    @torch.no_grad()
    def update(self, key: Tensor, value: Tensor, query: Tensor, context: TokenContext) -> Slots:
        """Take in one token per row: key and value [1, b, g, d] and query [1, b, h, d] before RoPE.

        A row whose token `context` does not count keeps its slots. Returns `slots`.
        """
        logits = decision_logits(key, self._policy.config.initial_decision_bias)[0]
        weight = self._policy.importance(query, key.shape[2])[0, ..., None]
        counted = torch.ones_like(logits, dtype=torch.bool) if context.counted is None else context.counted[0, :, None]
        opens = counted & ((logits <= 0) | (self._members == 0))
        self._members = torch.where(opens, 0, self._members) + counted
        self._lengths += opens
        self._make_room()

        terms = torch.cat((key[0].float() * weight, value[0].float() * weight, weight), -1) * counted[..., None]
        self._recent.masked_fill_(opens[..., None], 0)
        self._put(self._recent, (self._members - 1) % len(self._recent), terms, counted, add=self._window is None)
        total = self._recent.sum(0)
        mean_key, mean_value = (total[None, ..., :-1] / total[None, ..., -1:]).chunk(2, -1)
        newest = self._lengths - 1
        rotated = rotate_without_last(mean_key.to(key.dtype), context, 0.0)
        self._put(self._key, newest, rotated[0], counted)
        self._put(self._value, newest, mean_value[0].to(value.dtype), counted)
        return self.slots

    @staticmethod
    def _put(memory: Tensor, place: Tensor, new: Tensor, counted: Tensor, *, add: bool = False) -> None:
        """memory [n, b, g, c] at place [b, g] becomes, or is increased by, `new` [b, g, c] where counted."""
        index = place.clamp(min=0)[None, ..., None].expand(1, *new.shape)
        old = memory.gather(0, index)
        changed = old + new if add else new[None]
        memory.scatter_(0, index, torch.where(counted[..., None], changed, old))

    def _make_room(self) -> None:
        self._longest += 1
        if self._longest <= len(self._key):
            return
        self._longest = int(self._lengths.max())
        if self._longest > len(self._key):
            self._key, self._value = (
                torch.cat((tensor, torch.zeros_like(tensor))) for tensor in (self._key, self._value)
            )
