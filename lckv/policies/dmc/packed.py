"""From parallel evaluation to what is worth keeping: the finished slots alone, in memory of their size.

Shapes: s tokens, b rows, g KV heads, d channels, n slots of all rows and heads together.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lckv.policies.base import KeyValue
from lckv.policies.dmc.decisions import HIDDEN


class PackedSlots(NamedTuple):
    """Slots one after the other: all of row 0's head 0, of its head 1, and so on; as many as decisions opened."""

    key: Tensor
    """[n, d], rotated to the newest token of each slot, channel d - 1 zero."""

    value: Tensor
    """[n, d]."""

    lengths: Tensor
    """int32 [b, g]: slots of each row and head."""

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self)


def pack_slots(key_value: KeyValue, counted: Tensor | None = None) -> PackedSlots:
    """The slots that `DMCPolicy.keys_values` made in evaluation (hard decisions) of [s, b, g, d].

    A token's entry is a whole slot iff no later token was merged into it, so iff its bias hides it from nobody. Tokens that are not
    `counted` (bool [s, b]; None: all are) are dropped. Equals the slots that `DMCSlots` makes of the same tokens one by one.
    """
    whole = key_value.key[..., -1] > HIDDEN / 2
    if counted is not None:
        whole = whole & counted[..., None]
    whole = whole.permute(1, 2, 0)
    key, value = (tensor.permute(1, 2, 0, 3)[whole] for tensor in key_value)
    key[:, -1] = 0
    return PackedSlots(key, value, whole.sum(-1, dtype=torch.int32))
