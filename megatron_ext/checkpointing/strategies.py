"""How tensors get into the files of Megatron's `torch_dist` format and out of them.

The files are the ones that `megatron.core.dist_checkpointing` reads and writes; two things differ from its
own strategies.

**No process is forked or spawned for writing.** Megatron's writer forks, from a process that holds CUDA and
gloo threads; a child that dies there (for example for want of psutil) leaves the parent waiting forever. Here
every rank writes its file itself.

**Nothing is unpickled.** Of a checkpoint's files
  - *.distcp hold tensors, and objects of Transformer Engine, each as torch.save writes it;
  - common.pt holds the optimizer's hyper-parameters: the same;
  - .metadata, the table of contents, is a pickle of torch's dataclasses;
  - all the rest is JSON and safetensors.
The pickles are read as data (`lckv/weights/pickled_data.py`, `contents.py`): a checkpoint from a stranger can
be wrong, but it cannot run anything or take up more memory than its files are large. That its files are the
ones that were written is said by the manifest, which is checked before any of them is read.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, is_main_replica
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    mcore_to_pyt_state_dict,
)
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from lckv.weights.pickled_file import READING_ERRORS, load_tensors, read_torch_file
from lckv.weights.pickled_tensor import PickledTensor
from megatron_ext.checkpointing.agreement import Agreement
from megatron_ext.checkpointing.contents import read_contents
from megatron_ext.checkpointing.errors import DamagedCheckpointError, disk_full_in

State = dict[str, Any]
Copies = dict[MetadataIndex, torch.Tensor]
"""Tensors in the host's memory, by their places in a checkpoint."""


class Shards:
    """What this rank writes of a sharded state, as all ranks have planned it. Make it with `plan_shards`."""

    def __init__(self, writer: "_Writer", planner: SavePlanner, plan: SavePlan, contents: Metadata | None):
        self._writer, self._plan, self._contents = writer, plan, contents
        self._planner: SavePlanner | _Staged = planner

    def stage(self, copies: Copies) -> Copies:
        """Copies all of it to the host's memory (pinned, where it comes from a GPU): what happens to the
        tensors afterwards does not matter. Takes as much memory as this rank's file will be large.

        `copies` are those of an earlier save, whose memory is used again. Returns those of this one.
        """
        staged = _Staged(self._planner, self._plan, copies)  # type: ignore[arg-type]
        self._planner = staged
        self._writer.per_thread_copy_ahead = 0  # nothing is left to be copied from a GPU
        return staged.copies

    def write(self) -> list[WriteResult]:
        """Writes this rank's file; says where in it everything is. No collective."""
        return self._writer.write_data(self._plan, self._planner).value()

    def finish(self, results: list[list[WriteResult]]) -> None:
        """On rank 0: writes the table of contents, from what `write` returned on each rank."""
        assert self._contents is not None, "rank 0 has it"
        self._writer.finish(self._contents, results)


def plan_shards(ranks: Agreement, state: State, checkpoint: Path) -> Shards:
    """Plans which rank writes what it is the main owner of in a sharded state. Collective; a failure on one
    rank is raised on all."""
    writer = _Writer(checkpoint, sync_files=True, thread_count=1)
    planner = MCoreSavePlanner(flatten_state_dict=False)
    contents = None

    def plan() -> SavePlan:
        entries = [entry for entry in nested_values(state) if is_main_replica(entry.replica_id)]
        planner.set_up_planner(
            mcore_to_pyt_state_dict(_by_key(entries)),
            storage_meta=writer.storage_meta(),
            is_coordinator=ranks.rank == 0,
        )
        writer.set_up_storage_writer(ranks.rank == 0)
        return writer.prepare_local_plan(planner.create_local_plan())

    def share(plans: list[SavePlan]) -> list[SavePlan]:
        nonlocal contents
        plans, contents = planner.create_global_plan(plans)
        return writer.prepare_global_plan(plans)

    return Shards(writer, planner, planner.finish_plan(ranks.divide("plan", plan, share)), contents)


def read_shards(state: State, checkpoint: Path, group: dist.ProcessGroup) -> State:
    """Reads what this rank needs, straight into the tensors of a sharded state. Returns the state with
    tensors and objects in place of shards."""
    by_key = _by_key(list(nested_values(state)))
    tensors = [entries[0] for entries in by_key.values() if isinstance(entries[0], ShardedTensor)]
    flat = mcore_to_pyt_state_dict(by_key, is_loading=True)
    planner = _SafePlanner(
        shapes_validation_sharded_tensors=[tensor for tensor in tensors if not tensor.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={
            tensor.key: tensor for tensor in tensors if tensor.allow_shape_mismatch
        },
        flatten_state_dict=False,
        flatten_sharded_tensors=False,
    )
    dcp.load(flat, storage_reader=_SafeReader(checkpoint), planner=planner, process_group=group)
    for key, entries in by_key.items():
        if isinstance(entries[0], ShardedObject):
            for entry, value in zip(entries, flat[key], strict=True):
                entry.data = value
        else:
            for entry in entries:  # filled in place; only a leading axis of size 1 may have been added
                entry.data = entry.data.view(entry.local_shape)
    dict_list_map_inplace(lambda entry: entry.data, state)
    return state


def read_common(checkpoint: Path) -> State:
    """The part of a state that is no tensor and equal on all ranks.

    Raises DamagedCheckpointError.
    """
    path = checkpoint / COMMON_STATE_FNAME
    with _damage_of(path):
        content = load_tensors(read_torch_file(path))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dictionary")
        return content


def _by_key(entries: list[ShardedBase]) -> dict[str, list[ShardedBase]]:
    by_key: dict[str, list[ShardedBase]] = defaultdict(list)
    for entry in entries:
        by_key[entry.unique_key if isinstance(entry, ShardedObject) else entry.key].append(entry)
    return dict(by_key)


class _Staged:
    """Takes the place of a planner, for writing: its tensors are copies."""

    def __init__(self, planner: SavePlanner, plan: SavePlan, earlier: Copies) -> None:
        data = {item.index: planner.resolve_data(item) for item in plan.items}
        tensors = {index: part for index, part in data.items() if isinstance(part, torch.Tensor)}
        self.copies = {index: _copied(part, earlier.get(index)) for index, part in tensors.items()}
        self._data = {**data, **self.copies}  # the others are bytes that were made for this save
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def resolve_data(self, item: WriteItem) -> Any:
        """What is to be written for this item."""
        return self._data[item.index]


def _copied(tensor: torch.Tensor, memory: torch.Tensor | None) -> torch.Tensor:
    if memory is None or (memory.shape, memory.dtype) != (tensor.shape, tensor.dtype):
        memory = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
    return memory.copy_(tensor.detach(), non_blocking=True)


class _Writer(dcp.FileSystemWriter):
    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            # On its way to the other ranks the error is pickled, and loses what it was raised from.
            if full := disk_full_in(error):
                raise OSError(full.errno, full.strerror, str(self.path)) from error
            raise


class _SafePlanner(MCoreLoadPlanner):
    def load_bytes(self, read_item: Any, value: Any) -> None:
        self.state_dict[read_item.dest_index.fqn] = value


class _SafeReader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_contents(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            place = self.storage_data[item.storage_index]
            path = Path(self.path) / place.relative_path
            with _damage_of(path):
                content = read_torch_file(path, offset=place.offset, length=place.length)
                if item.type == LoadItemType.BYTE_IO:
                    planner.load_bytes(item, load_tensors(content))
                else:
                    _copy_part(content, item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _copy_part(stored: Any, item: ReadItem, planner: LoadPlanner) -> None:
    """Copies what is wanted of a stored tensor to where it is wanted."""
    name = item.storage_index.fqn
    if not isinstance(stored, PickledTensor):
        raise ValueError(f"{name} is no tensor there")
    part = narrow_tensor_by_index(stored.read(), item.storage_offsets, item.lengths)
    target = planner.resolve_tensor(item).detach()
    if target.size() != part.size():
        raise ValueError(f"{name} has the shape {list(part.shape)} there instead of {list(target.shape)}")
    target.copy_(part)
    planner.commit_tensor(item, target)


@contextmanager
def _damage_of(path: Path) -> Iterator[None]:
    """What goes wrong with reading a file of torch.save is its damage."""
    try:
        yield
    except READING_ERRORS as error:
        raise DamagedCheckpointError(
            f"checkpoint.load: {path} is damaged: {error}. Nothing of it was run"
        ) from error
