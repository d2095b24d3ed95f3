"""One more token of each of some sequences: planned on the host, run on the device.

    plan      host      what the step looks at and where it writes; pages that it may need are taken
    run       device    `state`, `attend` and `commit`, in any model: operators on tensors that ask nothing
    settle    host      lengths afterwards; those that a KV policy decides are fetched from the device

What `run` reads of a plan lies in tensors that stay where they are, so operators that were captured once (in
a CUDA graph) can be launched again for the next plan. With `fixed` they are of one shape too, whatever a plan
says: lists of work have room for more and end where a number on the device says, and rows that stand for
nothing repeat what the first one writes.

Shapes: b rows, h query heads, g KV heads, d channels of a head, e extra channels of a policy's keys,
l layers that compute keys and values.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lckv.attention.key_bias import KeyBias
from lckv.attention.visibility import Visibility
from lckv.cache import paged_writing
from lckv.cache.one_token import OneToken
from lckv.cache.paged_memory import PagedMemory
from lckv.policies.base import Extension
from lckv.sharing.mixing import Second


class Inputs:
    """Integers that the host writes and the device reads, in memory that stays where it is."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        """`sizes`: of each part."""
        host = torch.zeros(sum(sizes), dtype=torch.int64)
        self._host = host if device.type == "cpu" else host.pin_memory()
        self._device = self._host if device.type == "cpu" else host.to(device)
        self.arrays: list[NDArray[np.int64]] = [part.numpy() for part in self._host.split(list(sizes))]
        """Of the host."""
        self.tensors = self._device.split(list(sizes))
        """int64, of the device."""
        self._sent = None if device.type == "cpu" else torch.cuda.Event()

    def take_back(self) -> None:
        """Before writing: wait until the device has what was sent."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self) -> None:
        """Give the device what was written."""
        if self._sent is not None:
            self._device.copy_(self._host, non_blocking=True)
            self._sent.record()


class PagedStep:
    """Steps of up to `rows` sequences."""

    def __init__(self, memory: PagedMemory, rows: int, *, fixed: bool = False) -> None:
        """`fixed`: operators are the same whatever is planned. Else each plan is of exactly `rows`
        sequences."""
        self.rows, self._memory, self._fixed = rows, memory, fixed
        layers, _, heads = memory.tables.lengths.shape
        # Where every token gets a slot of its own the host knows the places of all.
        self._placed_by_host = memory.policy.traits.keeps_every_token
        places = layers * rows * heads
        self._inputs = Inputs(
            [rows, rows, rows, rows, places if self._placed_by_host else 0, places], memory.lengths.device
        )
        self._rows, self._source, self._one, positions, self._places, begin = self._inputs.tensors
        self._begin = begin.view(layers, rows, heads)
        self.positions = positions[None]
        """int64 [1, b]."""
        # [b] to [l, b, g]
        self._added = self._one[None, :, None].expand(layers, rows, heads)
        self._attention = OneToken(memory, self._rows, fixed=fixed)

    @property
    def shape(self) -> tuple[int, ...]:
        """What operators depend on: they are the same as long as this is."""
        return self.rows, *self._attention.capacities

    @property
    def rope_length(self) -> int:
        """See `KVCache`."""
        return self._memory.max_tokens

    def plan(self, sequences: Sequence[int]) -> bool:
        """Look at `sequences`, each of which gets one more token. False, with nothing changed, where that
        takes what `PagedRows` has: pages that are free only because the step gives back others, or an
        error."""
        memory, live = self._memory, len(sequences)
        numbers = np.array(sequences, np.int64)
        before = memory.tables.lengths[:, numbers]
        growth = memory.tables.growth(numbers, before + 1)
        if memory.tokens[numbers].max() >= memory.max_tokens or not memory.tables.reserve(growth):
            return False
        self._growth = growth
        padded = numbers
        self._inputs.take_back()
        rows, source, one, positions, places, begin = self._inputs.arrays
        one[:], source[:] = 1, np.arange(self.rows)
        if live < self.rows:
            padded = np.concatenate((numbers, np.full(self.rows - live, numbers[0])))
            one[live:], source[live:] = 0, 0
        rows[:], positions[:] = padded, memory.tokens[padded]
        if self._placed_by_host:
            places[:] = memory.tables.places(padded, memory.tables.lengths[:, padded]).ravel()
        else:
            begin[:] = memory.tables.begin(padded).ravel()
        self._attention.look(padded, live)
        self._inputs.send()
        return True

    def begin(self) -> None:
        """Before the operators of a step."""
        self._attention.forget()

    def state(self, layer: int) -> Tensor | None:
        """See `KVCache`; zeros stand for no tokens."""
        if self._memory.state is None:
            return None
        return self._memory.state[self._memory.number[layer]].index_select(1, self._rows)

    def attend(
        self,
        layer: int,
        query: Tensor,
        new: Extension,
        visibility: Visibility,
        *,
        scale: float,
        key_bias: KeyBias | None,
        second: Second | None = None,
    ) -> Tensor:
        """Attention of `query` [b, h, d + e] to what `layer` has made of earlier tokens, or to what `second`
        makes of that and of another layer's, and to `new`; [b, h, d]."""
        number = self._memory.number[layer]
        return self._attention.attend(number, query, new, visibility, scale, key_bias, second)

    def commit(self, extensions: Mapping[int, Extension]) -> None:
        """Write what each layer that computes keys and values has made of the new tokens."""
        memory = self._memory
        of_layers = [extensions[layer] for layer in memory.number]
        if self._fixed:
            of_layers = [self._repeated(extension) for extension in of_layers]
        if self._placed_by_host:
            key, value = (
                torch.cat(parts, 1) for parts in zip(*(part[:2] for part in of_layers), strict=True)
            )
            paged_writing.write_at(memory, self._places, key, value)
            memory.lengths.index_add_(1, self._rows, self._added)
        else:
            (part,) = paged_writing.place(memory, self._rows, of_layers, None)
            paged_writing.write(memory, self._begin, part)
            lengths = part.edit.lengths.unflatten(0, (len(of_layers), self.rows))
            memory.lengths.index_copy_(1, self._rows, lengths)
        memory.seen.index_add_(0, self._rows, self._one)
        if memory.state is not None:
            for number, extension in enumerate(of_layers):
                assert extension.state is not None, "the policy keeps one of every token"
                memory.state[number].index_copy_(1, self._rows, extension.state)

    def settle(self) -> None:
        """After the step: the host's lengths are those of the device, and pages that are not needed any more
        are free."""
        memory, numbers = self._memory, self._growth.sequences
        growth = self._growth
        if not self._placed_by_host:
            lengths = memory.lengths.index_select(1, self._rows[: len(numbers)]).cpu().numpy()
            growth = memory.tables.growth(numbers, lengths, written=False)
        memory.tables.fill_reserved(growth)
        memory.tokens[numbers] += 1
        memory.version += 1

    def _repeated(self, extension: Extension) -> Extension:
        """Rows that stand for nothing, with what the first row has: both are written to the same place."""
        hides, state = (
            None if part is None else part.index_select(1, self._source)
            for part in (extension.hides, extension.state)
        )
        key, value = (part.index_select(1, self._source) for part in extension[:2])
        return Extension(key, value, hides, state)
