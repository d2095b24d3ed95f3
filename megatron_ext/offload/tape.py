"""One call of a layer, whose activations go to the host or are computed again (MEMO, Zhao et al. 2024).

A layer is a row of parts. Of a token-wise one, a function of tensors whose first dimension is tokens, the
first share of the tokens of everything that backward needs goes to the host, and the rest is dropped. In
backward, when the first of these tensors is needed, the function runs again on the other tokens only, from
its inputs, which are on the host whole; what it saves then completes each tensor:

    forward     function(tokens 0 .. n)    saves A, B, C:  head to the host, tail dropped
    backward    function(tokens k .. n)    saves A, B, C:  tail            -> A = head from the host + tail

So the backward runs over whole tensors, as if nothing had happened. Of other parts (attention, and a KV
policy that looks at other tokens) all that backward needs goes to the host whole: computing attention again
costs the square of the length, and a policy's window or recurrence begins before the first token that would
be computed again.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_ext.offload.held import Held, View, memory_of, view_of
from megatron_ext.offload.host_pool import HostPool
from megatron_ext.offload.tokens import Split, Tokens
from megatron_ext.offload.transfer import Buffers, Link

Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Storage:
    """Where activations go; one for all layers of a rank."""

    pool: HostPool
    link: Link
    buffers: Buffers


@dataclass(eq=False)
class _Again:
    """A token-wise function that runs again in backward."""

    function: Callable[..., Any]
    inputs: list[tuple["View | Tensor", bool]]
    """With whether a gradient is needed."""

    saved: list[int | None] = field(default_factory=list)
    """For each tensor that it saves, in order: the number of the held tensor that this one completes."""

    outputs: dict[int, int] = field(default_factory=dict)
    """The number of the held tensor that an output completes, where another part needs the output."""

    done: bool = False


@dataclass(eq=False)
class _Known:
    """A tensor that is alive during forward, and where it is held."""

    tensor: Tensor
    number: int | None = None
    """None: nobody has needed it yet."""

    split: Split | None = None
    again: _Again | None = None
    """Whose output it is."""

    output: int = 0


class _EnoughError(Exception):
    """Everything that is needed has been computed again."""


class Tape:
    """Usage: `with tape: ... tape.token_wise(function, x) ... with tape.whole(): ...`."""

    def __init__(
        self, storage: Storage, tokens: Tokens, constants: Iterable[Tensor], before: "Tape | None"
    ) -> None:
        """`constants`: what stays where it is, such as weights. `before`: the layer below, whose backward
        comes next."""
        self._storage, self.tokens = storage, tokens
        self._before = None if before is None else weakref.ref(before)
        self._constants: set[int] = set()
        self._alive: list[_Known] = []
        self._held: list[Held] = []
        self._part_of: dict[int, _Again] = {}
        self.keep(*constants)

    def __enter__(self) -> "Tape":
        return self

    def __exit__(self, *_: object) -> None:
        self._storage.link.release(self._alive)
        self._alive, self._constants = [], set()

    def keep(self, *tensors: Tensor) -> None:
        """These stay on the device; they must live until forward of the layer is over."""
        self._constants.update(map(memory_of, tensors))

    def expect(self, *tensors: Tensor) -> None:
        """Where parts of these are needed, the whole goes to the host, once, and not each part."""
        self._alive += [_Known(tensor) for tensor in tensors]

    def token_wise(
        self, function: Function, *inputs: Tensor, again: Function | None = None
    ) -> tuple[Tensor, ...]:
        """`function(*inputs)`, of tensors [s, b, ...] or of all shards. `again`: the same function for
        the tokens that are computed again, where it depends on their places."""
        part = _Again(again or function, [])
        if not self.tokens.all_on_host:
            part.inputs = [(self._whole(tensor), tensor.requires_grad) for tensor in inputs]
        else:
            self.expect(*inputs)

        def pack(tensor: Tensor) -> View | Tensor:
            packed, new = self._pack(tensor, self.tokens.split(tensor.shape))
            part.saved.append(new)
            if new is not None:
                self._part_of[new] = part
            return packed

        with saved_tensors_hooks(pack, self._unpack):
            outputs = function(*inputs)
        for number, output in enumerate(outputs):
            self._alive.append(
                _Known(output, split=self.tokens.split(output.shape), again=part, output=number)
            )
        return outputs

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Around a part that is not token-wise."""
        with saved_tensors_hooks(lambda tensor: self._pack(tensor, None)[0], self._unpack):
            yield

    # Forward.

    def _pack(self, tensor: Tensor, split: Split | None) -> tuple[View | Tensor, int | None]:
        """What is kept for `tensor`, and the number of the held tensor if it is a new one with a tail."""
        if memory_of(tensor) in self._constants:
            return tensor, None
        view = self._view(tensor)
        if view is not None:
            return view, None
        if split is None and tensor.numel() < self.tokens.count:
            return tensor, None
        number = self._hold(tensor, split)
        view = self._view(tensor)
        assert view is not None
        return view, None if split is None else number

    def _view(self, tensor: Tensor) -> View | None:
        """`tensor` in the memory of one that is alive and held; those that are not yet are."""
        for known in self._alive:
            view = view_of(tensor, known.tensor, -1 if known.number is None else known.number)
            if view is None:
                continue
            if known.number is None:
                known.number = self._add(known.tensor, known.split)
                if known.again is not None and known.split is not None:
                    known.again.outputs[known.output] = known.number
                    self._part_of[known.number] = known.again
            return view._replace(number=known.number)
        return None

    def _whole(self, tensor: Tensor) -> View | Tensor:
        return self._pack(tensor, None)[0]

    def _hold(self, tensor: Tensor, split: Split | None) -> int:
        number = self._add(tensor, split)
        self._alive.append(_Known(tensor, number))
        return number

    def _add(self, tensor: Tensor, split: Split | None) -> int:
        self._held.append(Held.keep(tensor, split, self.device_bytes, self._storage.pool, self._storage.link))
        return len(self._held) - 1

    # Backward.

    @property
    def device_bytes(self) -> int:
        """See `Loadable`."""
        return self._held[-1].end if self._held else 0

    def load(self, memory: Tensor, link: Link) -> None:
        """See `Loadable`."""
        for held in self._held:
            held.load(memory, link)

    def evicted(self) -> None:
        """See `Loadable`."""
        for part in self._part_of.values():
            part.done = False

    def before(self) -> "Tape | None":
        """See `Loadable`."""
        return None if self._before is None else self._before()

    def _unpack(self, packed: View | Tensor) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        memory = self._storage.buffers.memory_of(self)
        part = self._part_of.get(packed.number)
        if part is not None and not part.done and not self.tokens.all_on_host:
            self.compute_again(part, memory)
        return packed.of(self._held[packed.number].on_device(memory))

    def compute_again(self, part: _Again, memory: Tensor) -> None:
        """Completes what `part` holds, in `memory`."""
        inputs = [
            self.tokens.tail(self._unpack(packed)).detach().requires_grad_(gradient)
            for packed, gradient in part.inputs
        ]
        wanted = 1 + max((place for place, number in enumerate(part.saved) if number is not None), default=-1)
        place = 0

        def record(tensor: Tensor) -> None:
            nonlocal place
            number = part.saved[place] if place < wanted else None
            if number is not None:
                self._held[number].complete(memory, tensor.detach())
            place += 1
            if place == wanted and not part.outputs:
                raise _EnoughError

        try:
            with torch.enable_grad(), saved_tensors_hooks(record, _never):
                outputs = part.function(*inputs)
        except _EnoughError:
            outputs = ()
        assert place >= wanted, f"{place} tensors were saved where {wanted} had been saved in forward"
        for output, number in part.outputs.items():
            self._held[number].complete(memory, outputs[output].detach())
        part.done = True


def _never(_: object) -> Tensor:
    raise AssertionError("a graph that is only there to be recorded has no backward")
