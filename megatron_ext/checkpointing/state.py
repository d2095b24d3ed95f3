"""The tensors of model and optimizer: what is saved and loaded, in a form that knows which part of the whole
each rank holds."""

import io
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedTensorFactory,
    apply_factory_merges,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_ext.atomic import write_file
from megatron_ext.checkpointing.agreement import Agreement
from megatron_ext.checkpointing.buckets import Sharding, is_in_buckets, tidy_buckets
from megatron_ext.checkpointing.errors import MismatchError
from megatron_ext.checkpointing.fp8_state import EXTRA_STATE, give_back, scaling_states
from megatron_ext.checkpointing.optimizer_state import (
    fill_missing_state,
    leave_out_places,
    load_distributed_optimizer,
    optimizer_entries,
    place_step,
    put_places,
    states_of_leaves,
)
from megatron_ext.checkpointing.reading import State, read_common, read_entries
from megatron_ext.checkpointing.shards import Shards
from megatron_ext.checkpointing.shares import entries_to_read, entries_to_write, send_around
from megatron_ext.checkpointing.slices import main_key
from megatron_ext.mcore import keep_settings

_BYTES_PER_ENTRY = 4096
"""Zip header, padding and table of contents of one tensor; generous."""
_SHOWN = 10


def sharded_state(
    model: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    *,
    stored: Collection[str] | None = None,
    sharding: Sharding = "fully_reshardable",
) -> State:
    """What a checkpoint saves, or what is filled from one with the keys `stored`. Tensors are where model and
    optimizer have them. No state is sent between ranks."""
    finish_parameter_gather(model)
    chunks = unwrap_model(list(model))
    metadata = _metadata(sharding)
    state: State = {}
    for i, chunk in enumerate(chunks):
        entries = chunk.sharded_state_dict(metadata=metadata)
        scaling = scaling_states(chunk, entries, is_loading=stored is not None)
        state[_chunk_name(i, chunks)] = {**_without_extra_state(entries), **scaling}
    if optimizer is not None and not getattr(optimizer, "is_stub_optimizer", False):
        fill_missing_state(optimizer)
        state["optimizer"] = optimizer_entries(optimizer, state, stored, metadata)
        names = {
            entry.data.data_ptr(): entry.key
            for name, chunk in state.items()
            if name != "optimizer"
            for entry in chunk.values()
            if isinstance(entry, ShardedTensor | ShardedTensorFactory)
        }
        for leaf_state, leaf in states_of_leaves(state["optimizer"], optimizer):
            tidy_buckets(leaf_state, leaf, names)
        leave_out_places(state["optimizer"], optimizer)
    return state


def _without_extra_state(chunk: State) -> State:
    """Transformer Engine keeps FP8 scaling there, pickled: see `fp8_state.py`. Without it checkpoints move
    between Transformer Engine's layers and local ones."""
    return {key: entry for key, entry in chunk.items() if not key.endswith(EXTRA_STATE)}


def split_for_saving(state: State) -> tuple[State, State]:
    """(tensors and objects that are sharded, what is equal on all ranks)."""
    return save_preprocess(state, validate_access_integrity=False)  # the table of contents is checked instead


def bytes_to_write(sharded: State) -> int:
    """About how much this rank's main copies take in a checkpoint."""
    total = 0
    for entry in nested_values(sharded):
        if is_main_replica(entry.replica_id):
            total += _BYTES_PER_ENTRY + (entry.data.nbytes if isinstance(entry, ShardedTensor) else 0)
    return total


def plan_writing(ranks: Agreement, checkpoint: Path, sharded: State) -> Shards:
    """What this rank will write of a sharded state. Data-parallel ranks share what they hold copies of."""
    return Shards(entries_to_write(list(nested_values(sharded)), _data_group()), checkpoint, ranks.rank)


def common_file(common: State) -> bytes:
    """The content of common.pt: what is no tensor and equal on all ranks."""
    content = io.BytesIO()  # into a file, torch would hide that the disk is full
    torch.save(common, content)
    return content.getvalue()


def write_common(checkpoint: Path, content: bytes) -> None:
    """Writes common.pt, and which of Megatron's formats the folder has."""
    write_file(checkpoint / COMMON_STATE_FNAME, content)
    save_config(CheckpointingConfig("torch_dist", 1), str(checkpoint))


Fill = Callable[[list[ShardedBase]], None]
"""Fills tensors where they lie, and gives objects to their entries."""


def read_state(ranks: Agreement, checkpoint: Path, contents: Metadata, state: State) -> State:
    """Fills the tensors of `state` from a checkpoint, whatever layout it was saved from, and returns it with
    the common part."""
    return fill_state(
        ranks,
        state,
        lambda entries: read_entries(entries, checkpoint, contents),
        lambda: read_common(checkpoint),
    )


def fill_state(ranks: Agreement, state: State, fill: Fill, common: Callable[[], State]) -> State:
    """Has the tensors of `state` filled, and returns it with what `common` reads. Ranks share the reading of
    what they hold copies of."""

    def read() -> tuple[State, State, State]:
        dict_list_map_inplace(_merged_in_place, state)
        sharded, plain, factories = load_preprocess(state)
        sharded, _ = extract_sharded_base(sharded)
        fill(entries_to_read(list(nested_values(sharded)), _data_group()))
        return sharded, plain, factories

    sharded, plain, factories = ranks.everywhere("read tensors", read)
    ranks.everywhere("send tensors around", lambda: send_around(list(nested_values(sharded)), _data_group()))

    def join() -> State:
        whole = common()
        merge(whole, plain)
        dict_list_map_inplace(_value, sharded)
        merge(whole, sharded)
        return apply_factory_merges(whole, factories)

    return ranks.everywhere("join what was read", join)


def _value(entry: ShardedBase) -> Any:
    return entry.data.detach() if isinstance(entry, ShardedTensor) else entry.data


def _merged_in_place(entry: Any) -> Any:
    """The same entry. Where a factory's parts are views of its tensor, that is what they are merged to."""
    if not isinstance(entry, ShardedTensorFactory):
        return entry
    whole, merge_parts = entry.data.detach(), entry.merge_fn

    def merged(parts: State) -> Tensor:
        of_one = all(_begin(part) == _begin(whole) for part in nested_values(parts))
        return whole if of_one else merge_parts(parts)

    return replace(entry, merge_fn=merged)


def _begin(tensor: Tensor) -> int:
    """Where the memory begins in which a tensor lies."""
    return tensor.untyped_storage().data_ptr()


def apply_state(state: State, model: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None) -> None:
    """Gives what was read to model and optimizer. The dtypes of the model's parameters stay."""
    chunks = unwrap_model(list(model))
    for i, chunk in enumerate(chunks):
        give_back(chunk, state[_chunk_name(i, chunks)])
        _apply_to_model(state[_chunk_name(i, chunks)], chunk)
    if "optimizer" in state and optimizer is not None:
        put_places(state["optimizer"], optimizer)
        for leaf_state, leaf in states_of_leaves(state["optimizer"], optimizer):
            keep_settings(leaf_state, leaf)
            if isinstance(leaf, DistributedOptimizer):
                load_distributed_optimizer(leaf, leaf_state)
            else:
                place_step(leaf_state.get("optimizer", leaf_state), leaf)
                leaf.load_state_dict(leaf_state)


def _apply_to_model(state: State, chunk: torch.nn.Module) -> None:
    own = chunk.state_dict(keep_vars=True)
    names = state.keys() ^ own.keys()
    wrong = [name for name in sorted(names) if not name.endswith(EXTRA_STATE)]
    if wrong:
        raise MismatchError(f"the model and what was read have different names: {', '.join(wrong[:_SHOWN])}")
    # Weights have been read to where the model has them.
    rest = {
        name: value
        for name, value in state.items()
        if not (isinstance(value, Tensor) and isinstance(own.get(name), Tensor))
        or _begin(value) != _begin(own[name])
    }
    chunk.load_state_dict(rest, strict=False)


def check_fit(ranks: Agreement, checkpoint: Path, contents: Metadata, state: State) -> None:
    """Compares names and shapes of what is to be loaded with what a checkpoint holds, over all ranks.

    Without the optimizer in `state`, the one in the checkpoint does not matter.
    Raises MismatchError with all differences.
    """
    wanted_by_rank = ranks.to_first("list tensors", lambda: _wanted(state))
    wanted = {key: entry for entries in wanted_by_rank for key, entry in entries.items()}

    def compare() -> None:
        if "optimizer" in state:
            _check_kind(checkpoint, state["optimizer"])
        stored = contents.state_dict_metadata
        shapes = {
            key: tuple(entry.size)
            for key, entry in stored.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        absent = sorted(wanted.keys() - stored.keys())
        extra = sorted(
            key
            for key in stored.keys() - wanted.keys()
            if EXTRA_STATE not in key
            and main_key(key) not in wanted
            and ("optimizer" in state or not _of_optimizer(key))
        )
        other = [
            key for key, entry in sorted(wanted.items()) if key in shapes and not entry.accepts(shapes[key])
        ]
        if absent or extra or other:
            shown = [
                f"{key} (there {list(shapes[key])}, here {list(wanted[key].shape or ())})" for key in other
            ]
            parts = {"missing there": absent, "only there": extra, "other shape": shown}
            only_optimizer = all(map(_of_optimizer, absent + extra + other))
            if only_optimizer and not any(map(_of_optimizer, stored)):
                raise MismatchError(
                    f"checkpoint.load: {checkpoint} holds weights only, no optimizer to go on with. Set "
                    "checkpoint.finetune to start from its weights at iteration 0"
                )
            raise MismatchError(_explain_misfit(checkpoint, parts, only_optimizer))

    ranks.on_first("compare tensors", compare)


def _check_kind(checkpoint: Path, optimizer: State) -> None:
    """In float32 the tensors of a distributed and of another optimizer are the same, but not what is beside
    them."""
    saved = read_common(checkpoint).get("optimizer")
    if saved is not None and _is_distributed(saved) != _is_distributed(optimizer):
        there, here = map(_is_distributed, (saved, optimizer))
        difference = {"the distributed optimizer": [f"there {there}, here {here}"]}
        raise MismatchError(_explain_misfit(checkpoint, difference, only_optimizer=True))


def _is_distributed(optimizer: State) -> bool:
    kind = "param_state_sharding_type"
    return kind in optimizer or any(kind in part for part in optimizer.values() if isinstance(part, dict))


@dataclass(frozen=True)
class _Wanted:
    shape: tuple[int, ...] | None
    """None for an object."""
    any_length: bool
    """The first axis is a vocabulary, whose padding depends on the layout."""

    def accepts(self, shape: tuple[int, ...]) -> bool:
        if self.any_length and self.shape is not None:
            return shape[1:] == self.shape[1:]
        return shape == self.shape


def _wanted(state: State) -> dict[str, _Wanted]:
    sharded, _, _ = load_preprocess(state)
    wanted = {}
    for entry in nested_values(sharded):
        if isinstance(entry, ShardedTensor):
            wanted[entry.key] = _Wanted(tuple(entry.global_shape), entry.allow_shape_mismatch)
        elif isinstance(entry, ShardedObject):
            wanted[entry.unique_key] = _Wanted(None, False)
    return wanted


def _of_optimizer(key: str) -> bool:
    return key.startswith("optimizer.")


def _explain_misfit(checkpoint: Path, parts: dict[str, list[str]], only_optimizer: bool) -> str:
    lines = [
        f"checkpoint.load: {checkpoint} does not fit this run's {'optimizer' if only_optimizer else 'model'}"
    ]
    for title, names in parts.items():
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"  {title}: {', '.join(names[:_SHOWN])}{more}")
    if all(any(map(is_in_buckets, parts.get(title, []))) for title in ("missing there", "only there")):
        lines.append(
            "With checkpoint.optimizer_sharding dp_reshardable the weights must lie in the same buffers: "
            "what model.transformer_impl and parallel.overlap_grad_reduce were, or became where they are "
            "auto, must be as in the saved run. Save once there with fully_reshardable, or set "
            "checkpoint.finetune to take the weights only"
        )
    elif only_optimizer:
        lines.append(
            "Use parallel.use_distributed_optimizer, train.precision and train.trainable as in its "
            "config.json, or checkpoint.finetune to load weights only"
        )
    else:
        lines.append("Build the model as its config.json says, or load another checkpoint")
    if [title for title, names in parts.items() if names] == ["missing there"] and not only_optimizer:
        lines.append(
            "Parameters of a KV policy's own are added by conversion: lckv-megatron convert megatron-to-hf "
            f"--megatron-path {checkpoint} --hf-path NEW, then lckv-megatron convert hf-to-megatron "
            "--hf-path NEW --megatron-path NEW2 with the --compression.policy settings of this run"
        )
    return "\n".join(lines)


def _metadata(sharding: Sharding) -> dict[str, Any]:
    """Which of its formats Megatron is to use."""
    return {
        "distrib_optim_sharding_type": sharding,
        "chained_optim_avoid_prefix": True,
        # Every layer has names of its own: layers of a sharing map differ.
        "non_homogeneous_layers": True,
        "dp_cp_group": _data_group(),
    }


def _data_group() -> torch.distributed.ProcessGroup:
    """The ranks that hold copies of the same weights."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _chunk_name(index: int, chunks: Sequence[torch.nn.Module]) -> str:
    return "model" if len(chunks) == 1 else f"model{index}"


def finish_parameter_gather(model: Sequence[torch.nn.Module]) -> None:
    """With overlap_param_gather the updated weights of other ranks arrive only in the next forward pass:
    fetch them now."""
    for chunk in model:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
