"""What captures a step where there are no CUDA graphs: the operators that were called, to be called again on
the same memory."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

WAITING = ("_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "unique", "masked_select")
"""Beginnings of the names of operators whose results the host waits for."""


class WaitingError(RuntimeError):
    """An operator that a captured step cannot call."""


class Tape(TorchDispatchMode):
    """Records the operators called under it. Refuses those that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name.startswith(WAITING):
            raise WaitingError(name)
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, result))
        return result

    def __len__(self) -> int:
        return len(self._calls)

    def replay(self) -> dict[int, Tensor]:
        """Call them again; the new results by the identity of those that were recorded."""
        made: dict[int, Tensor] = {}

        def newest(value: Any) -> Any:
            return made.get(id(value), value) if isinstance(value, Tensor) else value

        for func, args, kwargs, recorded in self._calls:
            result = func(*tree_map(newest, args), **tree_map(newest, kwargs))
            before, after = (
                value if isinstance(value, list | tuple) else (value,) for value in (recorded, result)
            )
            made |= {
                id(one): other for one, other in zip(before, after, strict=True) if isinstance(one, Tensor)
            }
        return made


def capture(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """As `lckv.generation.step_graphs.cuda_graph`, but that `run` runs: what it changes is put back by
    nobody."""
    with Tape() as tape:
        output = run()
    return lambda: tape.replay()[id(output)]
