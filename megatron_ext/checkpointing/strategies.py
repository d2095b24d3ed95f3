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
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from lckv.weights.pickled_file import READING_ERRORS, load_tensors, read_torch_file
from lckv.weights.pickled_tensor import PickledTensor
from megatron_ext.checkpointing.contents import read_contents
from megatron_ext.checkpointing.errors import DamagedCheckpointError, disk_full_in

State = dict[str, Any]


def write_shards(state: State, checkpoint: Path, group: dist.ProcessGroup) -> None:
    """Writes what this rank is the main owner of in a sharded state. A failure on one rank of `group` is
    raised on all."""
    entries = [entry for entry in nested_values(state) if is_main_replica(entry.replica_id)]
    dcp.save(
        mcore_to_pyt_state_dict(_by_key(entries)),
        storage_writer=_Writer(checkpoint, sync_files=True, thread_count=1),
        planner=MCoreSavePlanner(flatten_state_dict=False),
        process_group=group,
    )


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
