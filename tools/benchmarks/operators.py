"""Operators that a function calls, counted by torch.profiler."""

import os
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ATTENTION = ("_flash_attention_for_cpu", "_flash_attention_for_cpu_backward")
"""Ends of the names of kernels of attention, which on a CPU call others."""


def kernels_of(step: Callable[[], object]) -> Counter[str]:
    """Kernels by the name of their operator, of the second call."""
    return operators_of(step)[0]


def operators_of(step: Callable[[], object]) -> tuple[Counter[str], int]:
    """Kernels by the name of their operator, and calls of operators, also those by other operators, of the
    second call of `step`."""
    step()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would tell of its own start and stop
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    events = list(seen.events())
    kernels = Counter(name for event in events if event.cpu_parent is None for name in _kernels_in(event))
    return kernels, sum(event.name.startswith("aten::") for event in events)


def _kernels_in(event: Any) -> list[str]:
    """The innermost kernels of a recorded call."""
    if not event.name.endswith(ATTENTION) and (
        inner := [name for child in event.cpu_children for name in _kernels_in(child)]
    ):
        return inner
    is_one = event.name.startswith("aten::") and is_kernel(event.name)
    return [event.name.removeprefix("aten::")] if is_one else []


@cache
def is_kernel(name: str) -> bool:
    """Whether an operator such as aten::mul makes or changes tensors by itself."""
    if name.startswith("aten::empty") or name in ("aten::resize_", "aten::set_"):
        return False
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"))
    operators = [getattr(packet, overload) for overload in packet.overloads()]
    return not any(operator.is_view or _is_composite(operator.name()) for operator in operators)


def _is_composite(name: str) -> bool:
    """Whether it is written in other operators. Overloads of TorchScript are no operators."""
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    except RuntimeError:
        return False
