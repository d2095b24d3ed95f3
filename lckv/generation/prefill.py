"""Prompts through the iterated layers of a map: how many passes, and when a row's keys and values have
settled.

The passes of a plan approach what decoding token by token gives: with m + b passes the first m + b tokens are
exact, and the error of the others about halves with each pass (LCKV, Wu and Tu, ACL 2024). Passes end where
the shared keys and values hardly change.

Shapes: s tokens, b rows, g KV heads, d channels of a head.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lckv.attention.key_bias import KeyBias
from lckv.policies.base import Extension


class Settling:
    """Says when iterating may end; see `lckv.sharing.execution.run_steps`.

    A row that has settled keeps its keys and values: they are written over those of later passes, which other
    rows may still need. So a row ends with what it would end with alone.
    """

    def __init__(
        self,
        tolerance: float,
        passes: int,
        rows: int,
        counted: Tensor | None,
        *,
        key_bias: KeyBias | None,
        device: torch.device,
        guessed: bool = False,
    ) -> None:
        """`tolerance`: the largest relative change (of the root mean square over a row's tokens, of the keys
        or the values of any shared layer) that counts as none. `passes`: at most so many. `counted` bool [b,
        s]: tokens that are not padding; None: all. `key_bias`: the last channel of keys is a bias of
        hard decisions, which have to be the same. `guessed`: the first pass reads a learned first guess, with
        which its keys and values are compared."""
        self._tolerance, self._biased = tolerance, key_bias is not None
        self._counted = None if counted is None else counted.transpose(0, 1)[:, :, None, None]
        self._layers: tuple[int, ...] = ()
        self._settled = torch.zeros(rows, dtype=torch.bool, device=device)
        self._any_settled = False
        self._pass, self._first = 0, 0 if guessed else 1
        self.passes = torch.full((rows,), min(2, passes), dtype=torch.int64, device=device)
        """int64 [b]: passes that each row needed: those until its keys and values settled, and one that reads
        them. Where several groups of layers are iterated, of the group that took the most."""

    def __call__(self, previous: Mapping[int, Extension], current: Mapping[int, Extension]) -> bool:
        """Compare the keys and values of two passes; True where all rows have settled."""
        if tuple(current) != self._layers:
            self._layers, self._pass = tuple(current), self._first
            self._settled, self._any_settled = torch.zeros_like(self._settled), False
        self._pass += 1
        if self._any_settled:
            for layer, extension in current.items():
                _keep(self._settled, previous[layer], extension)
        needed = self.passes.clamp(min=self._pass + 1)
        self.passes = torch.where(self._settled, self.passes, needed)
        changed = torch.stack([self._change(previous[layer], current[layer]) for layer in current]).amax(0)
        self._settled = self._settled | (changed < self._tolerance)
        settled = self._settled.tolist()
        self._any_settled = any(settled)
        return all(settled)

    def _change(self, before: Extension, after: Extension) -> Tensor:
        """float32 [b]: the larger of the relative changes of keys and values;
        infinite where decisions differ."""
        value = self._relative(before.value, after.value)
        if not self._biased:
            return torch.maximum(value, self._relative(before.key, after.key))
        other = before.key[..., -1:] != after.key[..., -1:]
        if self._counted is not None:
            other = other & self._counted
        key = self._relative(before.key[..., :-1], after.key[..., :-1])
        return torch.maximum(value, key).masked_fill(other.any(0).flatten(1).any(1), torch.inf)

    def _relative(self, before: Tensor, after: Tensor) -> Tensor:
        change, size = (after - before).float(), after.float()
        if self._counted is not None:
            change, size = change * self._counted, size * self._counted
        return change.square().sum((0, 2, 3)).sqrt() / size.square().sum((0, 2, 3)).sqrt()


def _keep(rows: Tensor, before: Extension, after: Extension) -> None:
    """Write what some rows (bool [b]) had before over what they have now."""
    for old, new in zip(before[:2], after[:2], strict=True):
        new.copy_(torch.where(rows[:, None, None], old, new))
    if before.hides is not None and after.hides is not None:
        after.hides.copy_(torch.where(rows[:, None], before.hides, after.hides))
