"""State of the distributed optimizer as it lies in Megatron's buffers (dp_reshardable), in a form that only a
run with the same buffers can take."""

import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

from megatron.core.dist_checkpointing import LocalNonpersistentObject, ShardedTensor
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer

_IN_BUCKETS = "optimizer.distributed."
_BUCKET = re.compile(r"\.gbuf_idx_(\d+)\..*\.bucket_idx_(\d+)")
_SIZES = ("per_bucket_numel", "per_bucket_numel_unpadded")

Sharding = Literal["fully_reshardable", "dp_reshardable"]
"""State of the distributed optimizer: as parts of one tensor per weight, which any layout can load; or as the
buffers in which each rank has them."""


def is_in_buckets(key: str) -> bool:
    """Whether a key of a checkpoint is that of a part of a buffer."""
    return key.startswith(_IN_BUCKETS)


def sharding_of(stored: Collection[str]) -> Sharding:
    """How the state of the distributed optimizer is cut in a checkpoint with these keys."""
    return "dp_reshardable" if any(map(is_in_buckets, stored)) else "fully_reshardable"


def tidy_buckets(leaf_state: Any, leaf: MegatronOptimizer, names: Mapping[int, str]) -> None:
    """Changes the state of one dp_reshardable optimizer in place; leaves another alone. `names`: the
    checkpoint's keys of weights, by the addresses of their parameters.

    Leaves off the sizes of the buckets, which their tensors have anyway: their keys are tuples, which reading
    refuses. Puts zeros behind the weights of a bucket, where Megatron leaves whatever the memory held. Names
    each bucket after the order of its weights: Transformer Engine's layers have another one than local
    layers, of the same total size, and nothing else would tell them apart.
    """
    if not isinstance(leaf, DistributedOptimizer):
        return
    _drop_sizes(leaf_state)
    for part in _parts(leaf_state):
        padding = part.get("padding")
        for entry in part.values():
            if not isinstance(entry, ShardedTensor):
                continue
            if isinstance(padding, LocalNonpersistentObject) and padding.obj:
                entry.data.zero_()
            match = _BUCKET.search(entry.key) if is_in_buckets(entry.key) else None
            if match is not None:
                bucket = leaf.buffers[int(match[1])].buckets[int(match[2])]
                order = [(names.get(weight.data_ptr()), tuple(weight.shape)) for weight in bucket.params_list]
                place = f"{match[0]}.weights_{zlib.crc32(repr(order).encode()):08x}"
                entry.key = entry.key.replace(match[0], place)


def _parts(state: Any) -> Iterator[dict[str, Any]]:
    """All dictionaries below `state`."""
    if isinstance(state, dict):
        yield state
    if isinstance(state, dict | list):
        for part in state.values() if isinstance(state, dict) else state:
            yield from _parts(part)


def _drop_sizes(state: Any) -> None:
    for part in list(_parts(state)):
        for name in _SIZES:
            part.pop(name, None)
