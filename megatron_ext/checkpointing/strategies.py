"""How tensors get into the files of Megatron's `torch_dist` format and out of them.

The files are the ones that `megatron.core.dist_checkpointing` reads and writes; two things differ from its
own strategies.

**No process is forked or spawned for writing.** Megatron's writer forks, from a process that holds CUDA and
gloo threads; a child that dies there (for example for want of psutil) leaves the parent waiting forever. Here
every rank writes its file itself.

**Nothing is unpickled that could run code.** Of a checkpoint's files
  - *.distcp hold tensors, and objects of Transformer Engine: read with torch's weights_only unpickler;
  - common.pt holds the optimizer's hyper-parameters: the same;
  - .metadata, the table of contents, is a pickle of torch's dataclasses: read with an unpickler that knows
    only these;
  - all the rest is JSON and safetensors.
So a checkpoint from a stranger can be wrong, but it cannot take over the process. That its files are the ones
that were written
is said by the manifest, which is checked before any of them is read.
"""

import pickle
from collections import defaultdict
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
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from megatron_ext.checkpointing.errors import DamagedCheckpointError, disk_full_in

State = dict[str, Any]

_UNPICKLING_ERRORS = (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, LookupError)

_CLASSES_OF_CONTENTS = {
    "torch": ("Size",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath", "PurePosixPath"),
}


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
    Read without trust, whatever torch's default is."""
    return torch.load(checkpoint / COMMON_STATE_FNAME, map_location="cpu", weights_only=True)


def read_contents(checkpoint: Path) -> Metadata:
    """The table of contents of a checkpoint: names, shapes and dtypes of its tensors.
    Raises DamagedCheckpointError."""
    return _SafeReader(checkpoint).read_metadata()


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
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=True)


class _SafeReader(dcp.FileSystemReader):
    def read_metadata(self) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            try:
                metadata = _ContentsUnpickler(file).load()
            except _UNPICKLING_ERRORS as error:
                raise DamagedCheckpointError(f"{file.name} cannot be read: {error}") from error
        if not isinstance(metadata, Metadata):
            raise DamagedCheckpointError(
                f"{file.name} holds a {type(metadata).__name__}, not a table of contents"
            )
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class _ContentsUnpickler(pickle.Unpickler):
    """Knows the dataclasses of a table of contents, dtypes, shapes and paths;
    all of them only hold values."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES_OF_CONTENTS.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of a table of contents")
