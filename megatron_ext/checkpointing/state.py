"""The tensors of model and optimizer: what is saved and loaded, in a form that knows which part of the whole
each rank holds."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import LocalNonpersistentObject, ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import merge, nested_values
from megatron.core.dist_checkpointing.mapping import apply_factory_merges, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, MegatronOptimizer
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_ext.atomic import write_file
from megatron_ext.checkpointing.agreement import Agreement
from megatron_ext.checkpointing.contents import read_contents
from megatron_ext.checkpointing.errors import MismatchError
from megatron_ext.checkpointing.strategies import Shards, State, plan_shards, read_common, read_shards
from megatron_ext.mcore import keep_settings, load_in_parallel, save_in_parallel

_BYTES_PER_ENTRY = 4096
"""Zip header, padding and table of contents of one tensor; generous."""
_SHOWN = 10
_EXTRA_STATE = "_extra_state"
_IN_BUCKETS = "optimizer.distributed."
_SIZES_OF_BUCKETS = ("per_bucket_numel", "per_bucket_numel_unpadded")

Sharding = Literal["fully_reshardable", "dp_reshardable"]
"""State of the distributed optimizer: one tensor per weight, so that it can be cut for any layout; or the
parts of its buffers as each rank has them, which needs no communication."""


def sharded_state(
    model: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    *,
    is_loading: bool,
    sharding: Sharding = "fully_reshardable",
) -> State:
    """What Megatron's distributed checkpoint saves, or fills. Collective: the distributed optimizer gathers
    its state, unless it is sharded as dp_reshardable."""
    finish_parameter_gather(model)
    chunks = unwrap_model(list(model))
    metadata = _metadata(sharding)
    state = {
        _chunk_name(i, chunks): _without_extra_state(chunk.sharded_state_dict(metadata=metadata))
        for i, chunk in enumerate(chunks)
    }
    if optimizer is not None and not getattr(optimizer, "is_stub_optimizer", False):
        _fill_missing_optimizer_state(optimizer)
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
        _tidy_buckets(state["optimizer"])
    return state


def _tidy_buckets(state: Any) -> None:
    """Of a dp_reshardable optimizer, leaves off the sizes of the buckets, which their tensors have anyway:
    their keys are tuples, which reading refuses. Puts zeros behind the weights of a bucket, where Megatron
    leaves whatever the memory held."""
    if not isinstance(state, dict | list):
        return
    if isinstance(state, dict):
        for name in _SIZES_OF_BUCKETS:
            state.pop(name, None)
        padding = state.get("padding")
        if isinstance(padding, LocalNonpersistentObject) and padding.obj:
            for entry in state.values():
                if isinstance(entry, ShardedTensor):
                    entry.data.zero_()
    for part in state.values() if isinstance(state, dict) else state:
        _tidy_buckets(part)


def _without_extra_state(chunk: State) -> State:
    """Transformer Engine keeps FP8 scaling there, pickled. It is not used here; without it checkpoints move
    between Transformer Engine's layers and local ones,
    and nothing pickled reaches Transformer Engine's loader."""
    return {key: entry for key, entry in chunk.items() if not key.endswith(_EXTRA_STATE)}


def split_for_saving(state: State) -> tuple[State, State]:
    """(tensors and objects that are sharded, what is equal on all ranks). Collective: checks that the shards
    cover the whole."""
    return save_preprocess(state)


def bytes_to_write(sharded: State) -> int:
    """About how much this rank's main copies take in a checkpoint."""
    total = 0
    for entry in nested_values(sharded):
        if is_main_replica(entry.replica_id):
            total += _BYTES_PER_ENTRY + (entry.data.nbytes if isinstance(entry, ShardedTensor) else 0)
    return total


def plan_writing(ranks: Agreement, checkpoint: Path, sharded: State) -> Shards:
    """What this rank will write of a sharded state. Data-parallel ranks share what they hold copies of."""

    def divide() -> None:
        save_in_parallel(lambda state, folder: None, sharded, checkpoint, _data_group())

    ranks.everywhere("divide the writing", divide)
    return plan_shards(ranks, sharded, checkpoint)


def common_file(common: State) -> bytes:
    """The content of common.pt: what is no tensor and equal on all ranks."""
    content = io.BytesIO()  # into a file, torch would hide that the disk is full
    torch.save(common, content)
    return content.getvalue()


def write_common(checkpoint: Path, content: bytes) -> None:
    """Writes common.pt, and which of Megatron's formats the folder has."""
    write_file(checkpoint / COMMON_STATE_FNAME, content)
    save_config(CheckpointingConfig("torch_dist", 1), str(checkpoint))


def read_state(ranks: Agreement, checkpoint: Path, state: State) -> State:
    """Fills the tensors of `state` from a checkpoint, whatever layout it was saved from, and returns it with
    the common part."""

    def read() -> State:
        sharded, plain, factories = load_preprocess(state)
        sharded, _ = extract_sharded_base(sharded)
        whole = read_common(checkpoint)
        merge(whole, plain)
        merge(
            whole,
            load_in_parallel(partial(read_shards, group=ranks.group), sharded, checkpoint, _data_group()),
        )
        return apply_factory_merges(whole, factories)

    return ranks.everywhere("read tensors", read)


def apply_state(state: State, model: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None) -> None:
    """Gives what was read to model and optimizer. The dtypes of the model's parameters stay."""
    chunks = unwrap_model(list(model))
    for i, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(state[_chunk_name(i, chunks)], strict=False)
        wrong = [key for key in (*missing, *unexpected) if not key.endswith(_EXTRA_STATE)]
        if wrong:
            raise MismatchError(
                f"the model and what was read have different names: {', '.join(wrong[:_SHOWN])}"
            )
    if "optimizer" in state and optimizer is not None:
        leaves = _leaves(optimizer)
        for i, leaf in enumerate(leaves):
            leaf_state = state["optimizer"] if len(leaves) == 1 else state["optimizer"][i]
            keep_settings(leaf_state, leaf)
            if isinstance(leaf, DistributedOptimizer):
                _load_distributed_optimizer(leaf, leaf_state)
            else:
                _place_step(leaf_state.get("optimizer", leaf_state), leaf)
                leaf.load_state_dict(leaf_state)


def sharding_of(ranks: Agreement, checkpoint: Path) -> Sharding:
    """How the state of the distributed optimizer is cut in a checkpoint."""

    def look() -> Sharding:
        names = read_contents(checkpoint).state_dict_metadata
        return "dp_reshardable" if any(map(_is_in_buckets, names)) else "fully_reshardable"

    return ranks.on_first("look how the optimizer is saved", look)


def _is_in_buckets(key: str) -> bool:
    return key.startswith(_IN_BUCKETS)


def check_fit(ranks: Agreement, checkpoint: Path, state: State) -> None:
    """Compares names and shapes of what is to be loaded with what a checkpoint holds, over all ranks.

    Without the optimizer in `state`, the one in the checkpoint does not matter.
    Raises MismatchError with all differences.
    """
    wanted_by_rank = ranks.gather("list tensors", lambda: _wanted(state))
    wanted = {key: entry for entries in wanted_by_rank for key, entry in entries.items()}

    def compare() -> None:
        stored = read_contents(checkpoint).state_dict_metadata
        shapes = {
            key: tuple(entry.size)
            for key, entry in stored.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        absent = sorted(wanted.keys() - stored.keys())
        extra = sorted(
            key for key in stored.keys() - wanted.keys() if "optimizer" in state or not _of_optimizer(key)
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
    if only_optimizer:
        lines.append(
            "Use parallel.use_distributed_optimizer and train.precision as in its config.json, or "
            "checkpoint.finetune to load weights only"
        )
    else:
        lines.append("Build the model as its config.json says, or load another checkpoint")
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


def _leaves(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _place_step(state: State, optimizer: MegatronOptimizer) -> None:
    """Puts the number of steps where the optimizer that is here looks for it, whichever one wrote `state`.

    torch's Adam counts for every parameter; Megatron saves that as one number, and leaves out a 0. Fused ones
    (Transformer Engine, apex) count for every group, and take no number of a parameter.
    """
    groups, step = state["param_groups"], state["state"].pop("common_step", None)
    if step is None:
        step = next((group["step"] for group in groups if "step" in group), 0)
    if isinstance(optimizer.optimizer, torch.optim.Adam):  # AdamW is one
        state["state"]["common_step"] = torch.tensor(float(step))
        return
    for group in groups:
        group["step"] = int(step)


def _load_distributed_optimizer(optimizer: DistributedOptimizer, state: State) -> None:
    """Loads in two steps, because megatron-core is wrong in one with torch's Adam, the optimizer without
    Transformer Engine.

    It then asks for a `step` among the tensors, where there is none, and it gives all weights one and the
    same step tensor: each would advance the step of all others.
    """
    tensors = state["param_state"]
    optimizer.load_state_dict(
        {key: value for key, value in state.items() if not key.startswith("param_state")}
    )
    inner_states = optimizer.optimizer.state
    steps = {
        parameter: inner.pop("step").clone() for parameter, inner in inner_states.items() if "step" in inner
    }
    if state["param_state_sharding_type"] == "dp_reshardable":
        with torch.no_grad():  # in float32 the main weights are the model's own
            optimizer.load_parameter_state_from_dp_reshardable(tensors)
    else:
        optimizer.load_parameter_state_from_fully_reshardable(tensors)
    for parameter, step in steps.items():
        inner_states[parameter]["step"] = step


def _fill_missing_optimizer_state(optimizer: MegatronOptimizer) -> None:
    """Gives an optimizer that has not stepped yet the zeros that it would start from;
    Megatron cannot save or load without."""
    for leaf in _leaves(optimizer):
        inner = leaf.optimizer
        if inner is None or leaf.init_state_fn is None:
            continue
        leaf.init_state_fn(inner, leaf.config)
        if isinstance(inner, torch.optim.Adam):  # AdamW is one
            for group in inner.param_groups:
                for parameter in group["params"]:
                    inner.state[parameter].setdefault("step", torch.tensor(0.0, dtype=torch.float32))
