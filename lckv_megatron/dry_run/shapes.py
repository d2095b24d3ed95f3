"""A short cut for tensors without numbers: an operation that was seen before with such shapes is not asked
again.

FakeTensorMode finds the shape, strides and dtype of results, at 0.3 ms for each operation. A training step
repeats a few hundred kinds of them tens of thousands of times. What FakeTensorMode answered is kept here for
operations that return new tensors, or the one that they change. A view is made as FakeTensorMode makes it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

_SELF = object()


class Shapes:
    """Results of operations by the shapes of their arguments."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._known: dict[Any, Any] = {}
        self._views: dict[Any, bool] = {}

    def __call__(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What FakeTensorMode would return."""
        if not args or kwargs.get("device") is not None or kwargs.get("out") is not None:
            return function(*args, **kwargs)
        if self._is_view(function) and type(args[0]) is FakeTensor:
            return self._view(function, args, kwargs)
        key = _key((function, args, *kwargs.items()))
        if key is None:
            return function(*args, **kwargs)
        known = self._known.get(key)
        if known is _SELF:
            return args[0]
        if known is not None:
            made = [self._new(*shape) for shape in known[1]]
            return made[0] if known[0] is None else known[0](made)
        output = function(*args, **kwargs)
        self._keep(key, output, args)
        return output

    def _keep(self, key: Any, output: Any, args: tuple[Any, ...]) -> None:
        if output is args[0]:
            self._known[key] = _SELF
            return
        tensors = [output] if isinstance(output, Tensor) else output
        container = None if isinstance(output, Tensor) else type(output)
        if container not in (None, tuple, list):
            return
        if not all(type(tensor) is FakeTensor for tensor in tensors):
            return
        given = {tensor.untyped_storage()._cdata for tensor in _tensors(args)}
        if all(tensor.untyped_storage()._cdata not in given for tensor in tensors):
            shapes = [(tensor.shape, tensor.stride(), tensor.dtype, tensor.fake_device) for tensor in tensors]  # type: ignore[union-attr]
            self._known[key] = container, shapes

    def _new(self, shape: Any, stride: Any, dtype: torch.dtype, device: torch.device) -> FakeTensor:
        with in_kernel_invocation_manager(self._mode):
            made = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return FakeTensor(self._mode, made, device)

    def _is_view(self, function: Any) -> bool:
        known = self._views.get(function)
        if known is None:
            returns = function._schema.returns
            known = self._views[function] = function is torch.ops.aten._unsafe_view.default or (
                len(returns) == 1
                and returns[0].alias_info is not None
                and not returns[0].alias_info.is_write
                and function.namespace == "aten"
            )
        return known

    def _view(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        device = args[0].fake_device
        with in_kernel_invocation_manager(self._mode):
            made = function(*args, **kwargs)
        if isinstance(made, Tensor):
            return FakeTensor(self._mode, made, device)
        return [FakeTensor(self._mode, view, device) for view in made]


def _key(values: Any) -> Any:
    """Of arguments, by value, tensors by shape; None where there is something else."""
    parts: list[Any] = []
    for value in values:
        if type(value) is FakeTensor:
            parts.append((value.shape, value.stride(), value.storage_offset(), value.dtype))
        elif isinstance(value, tuple | list):
            inner = _key(value)
            if inner is None:
                return None
            parts.append(inner)
        elif isinstance(value, Tensor | torch.Generator):
            return None
        else:
            parts.append((type(value), value))
    return tuple(parts)


def _tensors(values: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, tuple | list):
            tensors += _tensors(value)
    return tensors
