"""Bridges that let unmodified megatron-core run without CUDA, on gloo and CPU tensors. The only file that
patches anything.

megatron-core calls `torch.cuda` and asks for CUDA tensors in many places. Where there is no CUDA, each bridge
below replaces one such function by its CPU meaning. With CUDA present `install` does nothing.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._device import _device_constructors

_FACTORIES = (
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "rand",
    "randn",
    "zeros_like",
    "ones_like",
    "empty_like",
)
_MARK = "__lckv_cpu_bridge__"


@dataclass(frozen=True)
class Bridge:
    """One replacement: `owner.name` becomes `make(owner.name)`."""

    owner: Any
    name: str
    make: Callable[[Callable[..., Any]], Callable[..., Any]]

    @property
    def installed(self) -> bool:
        """Whether the replacement is in place."""
        return hasattr(getattr(self.owner, self.name), _MARK)

    def install(self) -> None:
        """Put the replacement in place, once."""
        if self.installed:
            return
        replacement = self.make(getattr(self.owner, self.name))
        setattr(replacement, _MARK, True)
        setattr(self.owner, self.name, replacement)


def install() -> None:
    """Install all bridges if there is no CUDA. May be called any number of times."""
    if torch.cuda.is_available():
        return
    # `with torch.device(...)` knows torch's factory functions by a list that it makes when it is first used:
    # make it now, of the originals, which the bridges still call. Otherwise it would leave their tensors
    # where they are.
    _device_constructors()
    for bridge in bridges():
        bridge.install()
    # The CPU generator stands for the CUDA one, so drawing inside a tracked region always changes it.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_keep_record)


@contextmanager
def installed() -> Iterator[None]:
    """All bridges while the context is open; those that were not there before are gone after it."""
    log = logging.getLogger("megatron.core.tensor_parallel.random")
    filters = list(log.filters)
    missing = [bridge for bridge in bridges() if not bridge.installed]
    before = [(bridge, vars(bridge.owner).get(bridge.name)) for bridge in missing]
    try:
        install()
        yield
    finally:
        log.filters[:] = filters
        for bridge, original in before:
            if original is None:  # it was inherited
                delattr(bridge.owner, bridge.name)
            else:
                setattr(bridge.owner, bridge.name, original)


def bridges() -> list[Bridge]:
    """All bridges, installed or not."""
    from megatron.core.optimizer import clip_grads
    from megatron.core.tensor_parallel import random as tensor_parallel_random

    cpu = torch.device("cpu")
    constants: dict[str, Any] = {
        "current_device": cpu,
        "set_device": None,
        "synchronize": None,
        "empty_cache": None,
        "current_stream": _NoStream(),
        "default_stream": _NoStream(),
    }
    return [
        *(Bridge(torch.cuda, name, _returning(value)) for name, value in constants.items()),
        Bridge(torch.cuda, "Stream", lambda original: type("Stream", (_NoStream,), {})),
        Bridge(torch.cuda, "get_rng_state", _ignoring_device(torch.get_rng_state)),
        Bridge(torch.cuda, "set_rng_state", _ignoring_device(torch.set_rng_state)),
        Bridge(torch.cuda, "manual_seed", _ignoring_device(torch.manual_seed)),
        Bridge(torch.cuda.nvtx, "range_push", _returning(None)),
        Bridge(torch.cuda.nvtx, "range_pop", _returning(None)),
        Bridge(tensor_parallel_random, "_get_cuda_rng_state", _without_arguments(torch.get_rng_state)),
        Bridge(tensor_parallel_random, "_set_cuda_rng_state", _ignoring_device(torch.set_rng_state)),
        Bridge(clip_grads, "multi_tensor_scale_impl", _scaling_in_place),
        Bridge(torch.Tensor, "cuda", lambda original: lambda tensor, *args, **kwargs: tensor),
        Bridge(torch.Tensor, "type", _type_named_after_cuda),
        *(Bridge(torch, name, _factory_on_cpu) for name in _FACTORIES),
    ]


class _NoStream:
    """What is put on a stream of the CPU is done at once."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """As torch.cuda.Stream."""

    def wait_stream(self, stream: Any) -> None:
        """There is nothing to wait for."""

    def wait(self, stream: Any = None) -> None:
        """As that of an event."""

    def record_event(self, event: Any = None) -> "_NoStream":
        """What is to be waited for: nothing."""
        return self

    def synchronize(self) -> None:
        """There is nothing to wait for."""


def _returning(value: Any) -> Callable[..., Callable[..., Any]]:
    return lambda original: lambda *args, **kwargs: value


def _without_arguments(function: Callable[..., Any]) -> Callable[..., Callable[..., Any]]:
    return lambda original: lambda *args, **kwargs: function()


def _ignoring_device(function: Callable[..., Any]) -> Callable[..., Callable[..., Any]]:
    """Keep the first argument (a state or a seed), drop device and graph options."""
    if function is torch.get_rng_state:
        return _without_arguments(function)
    return lambda original: lambda value, *args, **kwargs: function(value)


def _factory_on_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor asked for on CUDA, or in pinned memory, comes in ordinary CPU memory."""

    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if isinstance(device, str | torch.device) and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return original(*args, **kwargs)

    return factory


def _type_named_after_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    """The optimizers sort parameters by names such as "torch.cuda.FloatTensor"."""

    @functools.wraps(original)
    def type_(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(tensor, *args, **kwargs)
        if isinstance(result, str) and not result.startswith("torch.cuda."):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    return type_


def _scaling_in_place(original: Callable[..., Any]) -> Callable[..., Any]:
    """What clips gradients writes their products into tensors of their own first, and copies them then."""

    def scale(chunk: int, flag: torch.Tensor, lists: list[list[torch.Tensor]], factor: float) -> None:
        sources, targets = lists
        if all(source is target for source, target in zip(sources, targets, strict=True)):
            torch._foreach_mul_(targets, factor)
        else:
            original(chunk, flag, lists, factor)

    return scale


def _keep_record(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()
