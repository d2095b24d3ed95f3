"""What a rank holds of the distributed optimizer's state, in a form that any layout can load.

The distributed optimizer cuts the weights of a data-parallel group, laid behind one another, into one range
for each rank. So a rank holds of a weight [R, C] the numbers a : b of its rows laid behind one another: the
end of a row, whole rows, the beginning of a row. Each of these is a rectangle of the whole tensor, as what
tensor parallelism cuts out of it is. Checkpoints hold tensors in rectangles. So every rank writes and reads
what it holds, where it lies: nothing is gathered, and nothing of it is copied.

    key of a checkpoint                what
    KEY                                the weight, in the model's dtype
    optimizer.state.param.KEY          its main weight in float32, where that is not the weight itself
    optimizer.state.exp_avg.KEY, ...   its moments
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import LocalNonpersistentObject, ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer import DistributedOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor
from torch.nn import Parameter

State = dict[str, Any]

_MAIN = "param"
_STEP = "step"


class Slice(ShardedTensor):
    """A block of a tensor that only one rank of a data-parallel group holds."""


@dataclass(frozen=True)
class Held:
    """What a rank holds of a weight's state."""

    weight: Parameter
    """The model's."""
    tensors: Mapping[str, Tensor]
    """By their names, each flat: where they are the optimizer's own, or copies in float32 where it keeps
    other numbers."""


def main_key(key: str) -> str:
    """Under which key a checkpoint holds the main weight of the weight `key`."""
    return f"optimizer.state.{_MAIN}.{key}"


def slices_of(leaf: DistributedOptimizer, model: State, stored: Collection[str] | None) -> State:
    """The entries of all that this rank holds of an optimizer's state, to be saved, or loaded from a
    checkpoint with the keys `stored`; with it what `take_slices` needs.

    `model` is the sharded state of the model. A float32 weight that is its own main weight is saved once; it
    is loaded from the main weights of a checkpoint that has them: then its entry in `model` is changed.
    """
    places = {id(entry.data): (part, name) for part in model.values() for name, entry in part.items()}
    entries = {weight: part[name] for weight in _weights(leaf) for part, name in [places[id(weight)]]}
    if stored is not None:
        for weight in _weights(leaf):  # on every rank the same, whatever it holds of their state
            part, name = places[id(weight)]
            if _is_own_main(weight, leaf) and main_key(part[name].key) in stored:
                part[name] = replace(part[name], key=main_key(part[name].key))
    state: State = {}
    for index, (weight, first, last) in enumerate(_ranges(leaf)):
        entry = entries[weight]
        tensors = leaf._get_main_param_and_optimizer_states(weight)
        tensors = {kind: tensor.detach() for kind, tensor in tensors.items() if kind != _STEP}
        keys = {kind: f"optimizer.state.{kind}.{entry.key}" for kind in tensors}
        if _is_own_main(weight, leaf):
            assert _begin(tensors[_MAIN]) == _begin(weight), f"{entry.key} has a main weight beside it"
            del keys[_MAIN]
        elif stored is not None and keys[_MAIN] not in stored:
            keys[_MAIN] = entry.key  # saved where it was the weight itself
        blocks = {
            kind: list(_blocks(replace(entry, key=key), tensors[kind], first, last, leaf))
            for kind, key in keys.items()
        }
        state[str(index)] = {"blocks": blocks, "held": LocalNonpersistentObject(Held(weight, tensors))}
    return state


def take_slices(leaf: DistributedOptimizer, state: State) -> None:
    """Gives what was read to the optimizer; what was read where the optimizer has it is left there."""
    for part in state.values():
        held: Held = part["held"]
        leaf._set_main_param_and_optimizer_states(held.weight, dict(held.tensors))
    if isinstance(leaf.optimizer, HybridDeviceOptimizer):
        leaf.optimizer._sync_hdo_state_to_sub_optimizers()


def settings_of(leaf: DistributedOptimizer) -> State:
    """What of an optimizer's state is equal on all ranks."""
    inner = leaf.optimizer
    if isinstance(inner, torch.optim.Adam) and not inner.state:  # where all of its range is padding
        groups = [
            {name: value for name, value in group.items() if name != "params"} | {_STEP: None}
            for group in inner.state_dict()["param_groups"]
        ]
        return {"optimizer": {"param_groups": groups}}
    return leaf.state_dict()


def _ranges(leaf: DistributedOptimizer) -> Iterator[tuple[Parameter, int, int]]:
    """(a weight, from which to before which of its numbers this rank holds its state)."""
    for buffer in leaf.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for weight, ranges in bucket["param_map"].items():
                    yield weight, ranges["param"].start, ranges["param"].end


def _weights(leaf: DistributedOptimizer) -> Iterator[Parameter]:
    """All weights of which the ranks of the group hold state."""
    for buffer in leaf.buffers:
        yield from buffer.param_index_map


def _is_own_main(weight: Parameter, leaf: DistributedOptimizer) -> bool:
    return weight.dtype == torch.float32 and not leaf.config.use_precision_aware_optimizer


def _begin(tensor: Tensor) -> int:
    """Where the memory begins in which a tensor lies."""
    return tensor.untyped_storage().data_ptr()


def _blocks(
    entry: ShardedTensor | ShardedTensorFactory,
    held: Tensor,
    first: int,
    last: int,
    leaf: DistributedOptimizer,
) -> Iterator[Slice]:
    """The blocks of the numbers first : last of a weight, of which `entry` says where they belong."""
    replica = (*entry.replica_id[:2], leaf.distributed_optimizer_instance_id)
    parts = nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
    for part in parts:  # of a gated MLP: the gate, and the up projection
        assert part.data.is_contiguous(), f"{part.key} does not lie in one piece of its weight"
        start = part.data.storage_offset() - entry.data.storage_offset()
        low, high = max(first, start), min(last, start + part.data.numel())
        at = low - first
        for offsets, shape in rectangles(part.local_shape, low - start, high - start):
            count = math.prod(shape)
            axes = part.prepend_axis_num
            place = [base + offset for base, offset in zip(part.global_offset[axes:], offsets, strict=True)]
            yield Slice(
                part.key,
                held[at : at + count].view(shape),
                held.dtype,
                shape,
                part.global_shape,
                (*part.global_offset[:axes], *place),
                None,
                replica,
                axes,
                part.allow_shape_mismatch,
            )
            at += count


def rectangles(
    shape: Sequence[int], first: int, last: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(where it begins, its shape) of each of the blocks that make up the numbers first : last of a tensor
    whose rows lie behind one another, in their order.

    Of a tensor [R, C] these are at most three: the end of a row, whole rows, and the beginning of a row.
    """
    if first >= last:
        return
    if len(shape) <= 1:
        yield ((first,), (last - first,)) if shape else ((), ())
        return
    below = tuple(shape[1:])
    size = math.prod(below)
    while first < last:
        row, begin = divmod(first, size)
        rows = 0 if begin else (last - first) // size
        if rows:
            yield (row, *[0] * len(below)), (rows, *below)
            first += rows * size
        else:
            end = min(size, begin + last - first)
            for offsets, part in rectangles(below, begin, end):
                yield (row, *offsets), (1, *part)
            first += end - begin
