"""Where the newest tokens stand among the slots that a head has in a cache.

Slots are tokens that are kept. Where none of them is dropped but the newest (a = `KeyBias.age` is 1, or there
is no bias), they stand in order. Else all of the newest a are there, whatever was decided: they are the first
slots, as a ring, and what is kept of older ones stands behind them, in order:

    a = 3, tokens 0 .. 6, of which 1 was dropped      slots    0 1 2   3 4 5
                                                      tokens   6 4 5 | 0 2 3

Token t of a row, padding not counted, is in slot t mod a. That is the same of all heads, however many slots
they have; so one more token takes the place of the one that leaves the ring, and nothing is moved but that
one, to the end, if it is kept. Rows with fewer than a tokens have them in order.
"""

from torch import Tensor

from lckv.attention.key_bias import KeyBias


def ring_size(key_bias: KeyBias | None) -> int:
    """a, or 0: slots stand in order."""
    return 0 if key_bias is None or key_bias.age == 1 else key_bias.age


def ring_slot(token: Tensor, size: int) -> Tensor:
    """The slot of tokens, by their number in the row; if they are among the newest `size` of it."""
    return token % size


def ring_place(slot: Tensor, seen: Tensor, size: int) -> Tensor:
    """Of slots in use, their place among the newest `size` tokens, the oldest of which has 0, after `seen`
    tokens; -1 of slots behind the ring. All int64, which broadcast."""
    # Of the oldest, token `seen` - `size`, the slot is `seen` mod `size`.
    return ((slot - seen) % size).masked_fill(slot >= size, -1)
