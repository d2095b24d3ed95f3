"""The parts of a save: collecting and planning, which all ranks do together; writing, which each does alone;
and making a checkpoint of it, together again.

    lock -> temporary folder -> tensors, run state, random states -> hashes -> manifest -> rename -> `latest`
    -> old ones deleted

A checkpoint's folder:
    *.distcp, .metadata, metadata.json, common.pt   tensors of model and optimizer, as Megatron's torch_dist
    config.json, progress.json, scheduler.json      the run: settings, counters, learning-rate schedule
    rng/rank_00000.safetensors ...                  random states, one file per rank
    manifest.json                                   what all these files must be; written last
"""

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config

from megatron_ext.atomic import sync_file, write_file
from megatron_ext.checkpointing import folders
from megatron_ext.checkpointing.agreement import Agreement
from megatron_ext.checkpointing.buckets import Sharding
from megatron_ext.checkpointing.errors import CheckpointError, DiskFullError
from megatron_ext.checkpointing.lock import FolderLock
from megatron_ext.checkpointing.manifest import (
    FileEntry,
    Layout,
    Manifest,
    hash_files,
    list_files,
    write_manifest,
)
from megatron_ext.checkpointing.reading import State
from megatron_ext.checkpointing.records import Record, write_contents
from megatron_ext.checkpointing.rng import rng_states
from megatron_ext.checkpointing.shards import Copies, Shards
from megatron_ext.checkpointing.state import (
    bytes_to_write,
    common_file,
    plan_writing,
    sharded_state,
    split_for_saving,
    write_common,
)
from megatron_ext.checkpointing.verification import CONFIG_NAME, PROGRESS_NAME, SCHEDULER_NAME

_FILE_OF_RANK = re.compile(r"(?:__|rng/rank_)(\d+)[_.].*")


@dataclass(frozen=True)
class RunState:
    """What a checkpoint holds of a run."""

    model: Sequence[torch.nn.Module]
    """The chunks of this rank, wrapped or not."""
    optimizer: MegatronOptimizer | None
    scheduler: OptimizerParamScheduler | None
    progress: Mapping[str, Any]
    """What JSON can hold; tuples come back as lists."""
    config: Mapping[str, Any]
    """As `progress`."""


@dataclass(frozen=True)
class OpenSave:
    """A save of which nothing is written yet: its folder is made, and what this rank writes is known."""

    iteration: int
    staging: Path
    sequence: int
    needed_bytes: int
    shards: Shards
    files: Mapping[str, bytes]
    """Contents of this rank's other files, by name."""
    layout: Layout


@dataclass(frozen=True)
class Written:
    """What one rank has written."""

    records: list[Record]
    files: dict[str, FileEntry]


def open_save(
    ranks: Agreement,
    lock: FolderLock,
    directory: Path,
    iteration: int,
    state: RunState,
    *,
    sharding: Sharding,
) -> OpenSave:
    """Collects the state of all ranks, and makes a temporary folder for it. Collective."""

    def collect() -> tuple[State, State]:
        return split_for_saving(sharded_state(state.model, state.optimizer, sharding=sharding))

    sharded, common = ranks.everywhere("collect state", collect)
    needed_bytes = sum(ranks.gather("measure state", lambda: bytes_to_write(sharded)))
    ranks.on_first("take the folder", lock.take)
    staging, sequence = ranks.on_first(
        "make the temporary folder", lambda: folders.prepare_staging(directory, iteration, needed_bytes)
    )
    with _whole_or_removed(ranks, staging, iteration, needed_bytes):
        ranks.everywhere("find the temporary folder", lambda: _check_visible(staging, ranks.rank))
        files = ranks.everywhere("collect the run's settings", lambda: _files(state, common, ranks.rank))
        shards = plan_writing(ranks, staging, sharded)
    return OpenSave(iteration, staging, sequence, needed_bytes, shards, files, current_layout(state.model))


def stage(ranks: Agreement, save: OpenSave, copies: Copies) -> Copies:
    """Copies what this rank will write, as `Shards.stage`: then the run may go on. Collective."""
    with _whole_or_removed(ranks, save.staging, save.iteration, save.needed_bytes):
        return ranks.everywhere("copy to the host's memory", lambda: save.shards.stage(copies))


def write_state(save: OpenSave, rank: int) -> Written:
    """Writes the files of this rank, and makes them durable. No collective."""
    shards = save.shards.write()
    _write_files(save.staging, save.files)
    return Written(shards.records, {**shards.files, **_hash_files(save.staging, rank, shards.files)})


def publish(
    ranks: Agreement,
    lock: FolderLock,
    save: OpenSave,
    written: Callable[[], Written],
    keep_last: int | None,
) -> tuple[Path, Manifest]:
    """Makes a checkpoint of a save of which `written` says what this rank has written; returns its folder.
    Collective."""
    staging = save.staging
    with _whole_or_removed(ranks, staging, save.iteration, save.needed_bytes):
        parts = ranks.to_first("write files", written)

        def complete() -> Manifest:
            write_contents(staging, [record for part in parts for record in part.records])
            sync_file(staging / "rng")  # the other folder by the manifest
            files = _hash_files(staging, None)
            for part in parts:
                files |= part.files
            return Manifest(save.iteration, save.sequence, save.layout, dict(sorted(files.items())))

        manifest = ranks.on_first("write the table of contents", complete)
        ranks.on_first("write the manifest", lambda: write_manifest(staging, manifest))
        ranks.on_first("take the folder", lock.take)
        path = ranks.on_first("publish", lambda: folders.publish(staging, save.iteration))
    ranks.on_first("delete old checkpoints", lambda: folders.remove_old(staging.parent, keep_last))
    return path, manifest


@contextmanager
def _whole_or_removed(ranks: Agreement, staging: Path, iteration: int, needed_bytes: int) -> Iterator[None]:
    """Deletes the temporary folder after an error. That of a full disk says how much is needed."""
    try:
        yield
    except DiskFullError as error:
        free_bytes = ranks.on_first("clean up", lambda: _measure_and_remove(staging))
        name = folders.checkpoint_name(iteration)
        message = folders.explain_full_disk(staging.parent, name, needed_bytes, free_bytes)
        raise DiskFullError(f"{message} ({error})") from error
    except BaseException:
        if ranks.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def current_layout(model: Sequence[torch.nn.Module]) -> Layout:
    """The parallel layout of this process, with its part of a model."""
    return Layout(
        device="cuda" if torch.cuda.is_available() else "cpu",
        world_size=torch.distributed.get_world_size(),
        tensor=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
        context=parallel_state.get_context_parallel_world_size(),
        data=parallel_state.get_data_parallel_world_size(),
        stages=_layers_of_stages(model),
    )


def _layers_of_stages(model: Sequence[torch.nn.Module]) -> str:
    """As `Layout.stages`; Megatron's own models have equal stages."""
    placement = getattr(get_model_config(model[0]), "placement", None)
    if placement is None or placement.is_even:
        return ""
    stages = [placement.of_stage(stage) for stage in range(placement.stages)]
    return " | ".join(" ".join(f"{layers.start}-{layers.stop - 1}" for layers in chunks) for chunks in stages)


def rng_file(rank: int) -> str:
    """Where a rank's random states are, relative to the checkpoint."""
    return f"rng/rank_{rank:05d}.safetensors"


def _check_visible(staging: Path, rank: int) -> None:
    if not staging.is_dir():
        raise CheckpointError(
            f"checkpoint.save: rank {rank} does not see {staging}, which rank 0 has made; the directory must "
            "be on a file system that all nodes share"
        )


def _files(state: RunState, common: State, rank: int) -> dict[str, bytes]:
    """Content of this rank's files that are not of tensors, by name: of random states on each rank, and of
    the run on the first."""
    files = {rng_file(rank): safetensors.torch.save(rng_states())}
    if rank == 0:
        contents = {CONFIG_NAME: state.config, PROGRESS_NAME: state.progress}
        if state.scheduler is not None:
            contents[SCHEDULER_NAME] = state.scheduler.state_dict()
        files |= {name: json.dumps(content, indent=1).encode() for name, content in contents.items()}
        files[COMMON_STATE_FNAME] = common_file(common)
    return files


def _write_files(staging: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (staging / name).parent.mkdir(exist_ok=True)
        if name == COMMON_STATE_FNAME:
            write_common(staging, content)
        else:
            write_file(staging / name, content)


def _hash_files(staging: Path, rank: int | None, known: Collection[str] = ()) -> dict[str, FileEntry]:
    """Size and hash of the files of a rank's own, but for those that are `known`; with None, of those that
    are the whole checkpoint's. Makes them durable."""
    own = [name for name in list_files(staging) if _rank_of(name) == rank and name not in known]
    for name in own:
        sync_file(staging / name)
    return hash_files(staging, own)


def _rank_of(name: str) -> int | None:
    match = _FILE_OF_RANK.fullmatch(name)
    return int(match.group(1)) if match else None


def _measure_and_remove(staging: Path) -> int:
    free_bytes = shutil.disk_usage(staging.parent).free
    shutil.rmtree(staging, ignore_errors=True)
    return free_bytes
