"""Collectives as the record sees them: which kind, on which group, of how many bytes, how long."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from lckv_megatron.dry_run.hardware import Machine

_KINDS = {
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "_allgather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "_reduce_scatter": "reduce-scatter",
    "broadcast": "broadcast",
    "send": "send",
    "recv": "receive",
    "alltoall": "all-to-all",
    "barrier": "barrier",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
}
"""By the longest beginning of the operation's name."""


class Key(NamedTuple):
    """What collectives are counted by."""

    kind: str
    group: str
    ranks: int


@dataclass(frozen=True)
class Collective:
    """One call."""

    key: Key
    bytes: int
    """Of the whole: what an all-gather makes, what a reduce-scatter takes."""
    seconds: float


def kind_of(operation: str) -> str:
    """The kind of an operation of torch.ops.c10d, by its name."""
    beginnings = [beginning for beginning in _KINDS if operation.startswith(beginning)]
    return _KINDS[max(beginnings, key=len)] if beginnings else operation


def link_bytes(kind: str, ranks: int, number: int) -> float:
    """Bytes that each rank sends in a ring of `ranks`, for `number` bytes of the whole."""
    if kind == "all-reduce":
        return 2 * (ranks - 1) / ranks * number
    if kind in ("all-gather", "reduce-scatter", "all-to-all"):
        return (ranks - 1) / ranks * number
    return 0.0 if kind in ("receive", "barrier") else float(number)


class Groups:
    """The names of Megatron's groups of this rank."""

    def __init__(self) -> None:
        self._names: dict[tuple[int, ...], str] = {}
        world = tuple(range(dist.get_world_size()))
        named = {
            "tensor": parallel_state.get_tensor_model_parallel_group(),
            "pipeline": parallel_state.get_pipeline_model_parallel_group(),
            "context": parallel_state.get_context_parallel_group(),
            "data": parallel_state.get_data_parallel_group(),
            "data and context": parallel_state.get_data_parallel_group(with_context_parallel=True),
            "model": parallel_state.get_model_parallel_group(),
            "embedding": parallel_state.get_embedding_group(check_initialized=False),
        }
        for name, group in named.items():
            if isinstance(group, dist.ProcessGroup):
                self._names.setdefault(tuple(dist.get_process_group_ranks(group)), name)
        self._names.setdefault(world, "all")

    def name(self, ranks: tuple[int, ...]) -> str:
        """That of the group of these ranks."""
        return self._names.get(ranks, "other")


def read(function: Any, arguments: tuple[Any, ...], groups: Groups, machine: Machine) -> Collective | None:
    """The call of an operation of torch.ops.c10d; None where a rank is alone in the group."""
    named = dict(zip((argument.name for argument in function._schema.arguments), arguments, strict=False))
    group = dist.ProcessGroup.unbox(named["process_group"])
    ranks = tuple(dist.get_process_group_ranks(group))
    if len(ranks) == 1:
        return None
    kind = kind_of(function._schema.name.split("::")[1])
    # the whole is the largest of what is given: of inputs or outputs
    number = max((_bytes(value) for name, value in named.items() if name != "process_group"), default=0)
    key = Key(kind, groups.name(ranks), len(ranks))
    sent = link_bytes(kind, len(ranks), number)
    return Collective(key, number, machine.transfer_seconds(sent, ranks))


def results(function: Any, arguments: tuple[Any, ...]) -> Any:
    """What the operation returns, without having done anything: outputs, which are the first arguments of
    their type, and its work."""
    types = [str(argument.type) for argument in function._schema.arguments]
    returned = [
        _work() if str(value.type).endswith("Work") else arguments[types.index(str(value.type))]
        for value in function._schema.returns
    ]
    return returned[0] if len(returned) == 1 else tuple(returned)


def _work() -> Any:
    """One that is done: whoever keeps tensors until then lets them go."""
    from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]  # not in its stub

    done: torch.futures.Future[None] = torch.futures.Future()
    done.set_result(None)
    return _create_work_from_future(done).boxed()


def _bytes(value: Any) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for tensor in torch.utils._pytree.tree_leaves(value)
        if isinstance(tensor, Tensor)
    )


@dataclass(frozen=True)
class Total:
    """Calls of one key."""

    count: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Total") -> "Total":
        return Total(self.count + other.count, self.bytes + other.bytes, self.seconds + other.seconds)

    def times(self, number: int) -> "Total":
        """So many of them."""
        return Total(self.count * number, self.bytes * number, self.seconds * number)


def add_up(collectives: Iterable[Collective]) -> dict[Key, Total]:
    """By key."""
    totals: dict[Key, Total] = {}
    for collective in collectives:
        more = Total(1, collective.bytes, collective.seconds)
        totals[collective.key] = totals.get(collective.key, Total()) + more
    return totals
