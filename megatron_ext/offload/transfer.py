"""Copies between host and device beside the computation. On a CPU the same code makes plain copies."""

import weakref
from collections import deque
from typing import Any, Protocol

import torch
from torch import Tensor

_IN_FLIGHT = 1
"""Layers whose activations may be on their way to the host while the next one is computed: `auto` takes a
share with which a layer's copies take no longer than a layer's forward."""

Mark = Any
"""A moment of a stream: an event of CUDA."""


class Link:
    """The stream on which everything is copied, in the order in which it was asked for. So memory of the host
    that is given back may be written at once: what was still to be read from it has been."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._leaving: deque[tuple[Mark, object]] = deque()

    def copy(self, target: Tensor, source: Tensor) -> None:
        """`source` as it is now to `target`. Neither may be freed before the copy is done: see `release`."""
        if self._stream is None:
            target.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> Mark | None:
        """The end of all copies so far, for `wait`."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, mark: Mark | None) -> None:
        """Computation goes on after the copies before `mark`."""
        if mark is not None:
            computation = torch.cuda.current_stream()
            computation.wait_event(mark)

    def release(self, tensors: object) -> None:
        """Lets go of `tensors`, whose copies have been asked for, when those are done. Computation waits
        where more layers are on their way than may be, so that they cannot fill the device."""
        mark = self.mark()
        if mark is None:
            return
        self._leaving.append((mark, tensors))
        self._let_go(_IN_FLIGHT)

    def settle(self) -> None:
        """Lets go of everything; computation waits for the copies."""
        self._let_go(0)

    def _let_go(self, but: int) -> None:
        """Of all layers but the last few."""
        while len(self._leaving) > but:
            self.wait(self._leaving.popleft()[0])


class Loadable(Protocol):
    """What comes back to the device as a whole: the activations of one layer."""

    @property
    def device_bytes(self) -> int:
        """What it takes there."""
        ...

    def load(self, memory: Tensor, link: Link) -> None:
        """Ask `link` for the copies into `memory`, uint8 [device_bytes]."""
        ...

    def evicted(self) -> None:
        """Its memory is taken."""
        ...

    def before(self) -> "Loadable | None":
        """What backward needs after it."""
        ...


class _Buffer:
    """One of the two, and what is in it."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.mark: Mark | None = None
        self._resident: weakref.ref[Loadable] | None = None

    @property
    def resident(self) -> Loadable | None:
        return None if self._resident is None else self._resident()

    def empty(self, link: Link) -> None:
        """Give the memory back, after the copies into it."""
        if len(self.memory):
            link.wait(link.mark())
            self.memory = torch.empty(0, dtype=torch.uint8)

    def fill(self, loadable: Loadable, link: Link, device: torch.device) -> None:
        if self.resident is not None:
            self.resident.evicted()
        if len(self.memory) < loadable.device_bytes:
            self.empty(link)
            self.memory = torch.empty(loadable.device_bytes, dtype=torch.uint8, device=device)
        self._resident = weakref.ref(loadable)
        loadable.load(self.memory, link)
        self.mark = link.mark()


class Buffers:
    """Two buffers of the device, used in turns: while one layer's backward computes in one, the layer below
    is copied into the other."""

    def __init__(self, device: torch.device, link: Link) -> None:
        self._device, self._link = device, link
        self._buffers = (_Buffer(), _Buffer())
        self._current = 0

    @property
    def device_bytes(self) -> int:
        """Of both."""
        return sum(len(buffer.memory) for buffer in self._buffers)

    def release(self) -> None:
        """Give back the memory of layers that are gone: in forward nobody needs it."""
        for buffer in self._buffers:
            if buffer.resident is None:
                buffer.empty(self._link)

    def memory_of(self, loadable: Loadable) -> Tensor:
        """Where `loadable` lies, uint8; computation may read it from now on."""
        if self._buffers[self._current].resident is not loadable:
            self._arrive(loadable)
        return self._buffers[self._current].memory

    def _arrive(self, loadable: Loadable) -> None:
        self._link.settle()  # what comes is behind what leaves
        self._current = 1 - self._current
        buffer, other = self._buffers[self._current], self._buffers[1 - self._current]
        if buffer.resident is not loadable:
            buffer.fill(loadable, self._link, self._device)
        self._link.wait(buffer.mark)
        ahead = loadable.before()
        if ahead is not None:
            other.fill(ahead, self._link, self._device)
