"""Sees every operation of a program: the storages that it makes and drops, its collectives, its work.

A TorchDispatchMode below autograd. On tensors without numbers collectives are noted and not made, and a
number that is asked for (`.item()`) is 1. On ordinary tensors everything is made as well.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lckv_megatron.dry_run.collectives import Collective, Groups, read, results
from lckv_megatron.dry_run.hardware import Machine
from lckv_megatron.dry_run.memory import Allocation, Phase
from lckv_megatron.dry_run.shapes import Shapes

_ATEN = torch.ops.aten
_MOVE_NOTHING = {"_unsafe_view", "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}


@dataclass
class Work:
    """What was done in the phases of one kind."""

    flops: float = 0.0
    moved_bytes: float = 0.0
    seconds: float = 0.0
    """Of kernels."""
    again_flops: float = 0.0
    """Of those, what token-wise offload computes again."""
    to_host_bytes: float = 0.0
    from_host_bytes: float = 0.0
    waited_seconds: float = 0.0
    """For copies from and to the host."""
    collectives: list[Collective] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """Notes what happens while the mode is active."""

    def __init__(self, machine: Machine, fake: FakeTensorMode | None, *, granularity: int = 512) -> None:
        """`fake`: that of tensors without numbers. Storages are rounded up to `granularity` bytes."""
        super().__init__()
        self._machine, self._granularity = machine, granularity
        self._shapes = None if fake is None else Shapes(fake)
        self._groups = None if fake is None else Groups()
        self._live: dict[int, tuple[weakref.ref, Allocation]] = {}
        self._clock = 0
        self._on_host: set[int] = set()
        self._again = False
        self.allocations: list[Allocation] = []
        self.phases: list[Phase] = [Phase("build", 0)]
        self.seconds = 0.0
        """Of kernels."""
        self.now_seconds = 0.0
        """Of kernels, collectives and waits, one after the other."""
        self.work: dict[str, Work] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled: do not pay for it at each operation

    @contextmanager
    def phase(self, kind: str) -> Iterator[None]:
        """What happens meanwhile belongs to a phase of this kind; then the one around it goes on."""
        around = self.phases[-1]
        self._begin(kind)
        try:
            yield
        finally:
            self._begin(around.kind)

    def _begin(self, kind: str) -> None:
        self.phases[-1].end = self._clock
        self.phases.append(Phase(kind, self._clock))

    @property
    def now(self) -> int:
        """Number of the next event."""
        return self._clock

    @property
    def current(self) -> Work:
        """Of the kind of phase that is on."""
        return self.work.setdefault(self.phases[-1].kind, Work())

    def allocation(self, tensor: Tensor) -> Allocation:
        """That of a tensor's storage, noted now if it was not yet."""
        self._see(tensor)
        return self._live[tensor.untyped_storage()._cdata][1]

    def wait_for_forward(self, size: int, start: int) -> None:
        """So many bytes more are kept from before event `start` to the end of the last forward."""
        end = max(phase.end or 0 for phase in self.phases if phase.kind == "forward")
        seconds = max(allocation.start_seconds for allocation in self.allocations if allocation.start < end)
        self.allocations.append(
            Allocation(size, start - 1, 0.0, 0, end=end, end_seconds=seconds, kind="activations")
        )

    def kernel(self, *, flops: float, moved_bytes: float) -> None:
        """Note the work of a kernel that is not run."""
        seconds = self._machine.work_seconds(flops, moved_bytes)
        work = self.current
        work.flops += flops
        work.again_flops += flops if self._again else 0
        work.moved_bytes += moved_bytes
        work.seconds += seconds
        self.seconds += seconds
        self.now_seconds += seconds

    def wait_until(self, moment: float) -> None:
        """Nothing is computed before."""
        waited = max(0.0, moment - self.now_seconds)
        self.current.waited_seconds += waited
        self.now_seconds += waited

    @property
    def is_again(self) -> bool:
        """Whether what happens has happened before, and is repeated from what was kept."""
        return self._again

    @contextmanager
    def computing_again(self) -> Iterator[None]:
        """What happens meanwhile is done again."""
        before, self._again = self._again, True
        try:
            yield
        finally:
            self._again = before

    def put_on_host(self, tensor: Tensor) -> None:
        """A new tensor's storage takes no memory of the device."""
        self.allocations.remove(self.allocation(tensor))
        self._on_host.add(tensor.untyped_storage()._cdata)

    def is_on_host(self, tensor: Tensor) -> bool:
        """Whether its storage was put there."""
        return tensor.untyped_storage()._cdata in self._on_host

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self._shapes is not None:
            if function is torch.ops.prim.device.default:
                return args[0].fake_device if hasattr(args[0], "fake_device") else args[0].device
            if function is _ATEN._local_scalar_dense.default:
                return _one(args[0].dtype)
            if function.namespace == "c10d":
                return self._pretend_collective(function, args)
            output = self._shapes(function, args, kwargs or {})
        else:
            output = function(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            self._see(output)
        elif isinstance(output, tuple | list):
            for tensor in output:
                if isinstance(tensor, Tensor):
                    self._see(tensor)
        if not _moves_nothing(function):
            self._count(function, args, kwargs or {}, output)
        return output

    def _pretend_collective(self, function: Any, args: tuple[Any, ...]) -> Any:
        assert self._groups is not None
        collective = read(function, args, self._groups, self._machine)
        if collective is not None:
            self.current.collectives.append(collective)
            self.now_seconds += collective.seconds
        return results(function, args)

    def _count(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        flops = 0
        rule = flop_registry.get(function._overloadpacket)
        if rule is not None:
            # torch's rule of addmm takes the dtype of the result for a shape
            shaped = [value for value in args if not isinstance(value, torch.dtype)]
            flops = rule(*shaped, **kwargs, out_val=output)
        moved = _extent(args) + _extent(kwargs.values()) + _extent((output,))
        self.kernel(flops=flops, moved_bytes=moved)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        number = storage.nbytes()
        rounded = -(-number // self._granularity) * self._granularity
        allocation = Allocation(rounded, self._clock, self.seconds, len(self.phases) - 1)
        self._clock += 1
        self.allocations.append(allocation)
        self._live[key] = (weakref.ref(storage, partial(self._gone, key)), allocation)

    def _gone(self, key: int, _storage: object) -> None:
        _, allocation = self._live.pop(key)
        self._on_host.discard(key)
        allocation.end, allocation.end_seconds = self._clock, self.seconds
        self._clock += 1


def _one(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return False  # nothing is odd
    return 1.0 if dtype.is_floating_point else 1


@cache
def _moves_nothing(function: Any) -> bool:
    """Whether an operation only makes a view, or memory without contents."""
    name = function._schema.name.split("::")[1]
    views = any(
        returned.alias_info is not None and not returned.alias_info.is_write
        for returned in function._schema.returns
    )
    return views or name in _MOVE_NOTHING or function.namespace not in ("aten", "prims")


def _extent(values: Any) -> int:
    """Bytes of tensors, expanded ones as they are stored."""
    number = 0
    for value in values:
        if isinstance(value, Tensor):
            number += min(value.numel() * value.element_size(), value.untyped_storage().nbytes())
        elif isinstance(value, tuple | list):
            number += _extent(value)
    return number


Span = Callable[..., Any]


def spanning(recorder: Recorder, kind: str, function: Span) -> Span:
    """`function`, whose calls are phases of this kind."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with recorder.phase(kind):
            return function(*args, **kwargs)

    return call
