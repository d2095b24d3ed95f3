"""Writes a checkpoint so that at every moment, whatever dies, the directory holds the last good one.

    lock -> temporary folder -> tensors, run state, random states -> hashes -> manifest -> rename -> `latest`
    -> old ones deleted

A checkpoint's folder:
    *.distcp, .metadata, metadata.json, common.pt   tensors of model and optimizer, as Megatron's torch_dist
    config.json, progress.json, scheduler.json      the run: settings, counters, learning-rate schedule
    rng/rank_00000.safetensors ...                  random states, one file per rank
    manifest.json                                   what all these files must be; written last
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ext.atomic import sync_file, write_file
from megatron_ext.checkpointing import folders
from megatron_ext.checkpointing.agreement import Agreement, agreement
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
from megatron_ext.checkpointing.rng import rng_states
from megatron_ext.checkpointing.state import bytes_to_write, sharded_state, split_for_saving, write_state
from megatron_ext.checkpointing.verification import CONFIG_NAME, PROGRESS_NAME, SCHEDULER_NAME
from megatron_ext.errors import ConfigError

_FILE_OF_RANK = re.compile(r"(?:__|rng/rank_)(\d+)[_.].*")

logger = logging.getLogger(__name__)


def save_checkpoint(
    directory: Path,
    iteration: int,
    *,
    model: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    progress: Mapping[str, Any],
    config: Mapping[str, Any],
    keep_last: int | None = None,
    timeout_minutes: float = 30.0,
) -> Path:
    """Saves a run into a new folder of `directory`; returns the folder. All ranks call it together.

    `model` are the chunks of this rank, wrapped or not; `progress` and `config` hold what JSON can hold
    (tuples come back as lists). Afterwards all but the last `keep_last` checkpoints are deleted (None: none
    is). A checkpoint of the same iteration is replaced. Needs model parallelism to be initialised.

    Raises the same error on all ranks and leaves earlier checkpoints as they were: DiskFullError (also before
    anything is written, when it will not fit), FolderInUseError where another run writes there,
    CheckpointError for other failures of files, MissingRanksError when a rank does not come to a step within
    `timeout_minutes`.
    """
    directory = Path(directory)
    if keep_last is not None and keep_last < 1:
        raise ConfigError(
            f"checkpoint.keep_last: {keep_last} given; at least 1 is needed, or null to keep all"
        )
    lock = FolderLock(directory)  # held already by a run that has taken it for all of its saves
    with agreement(timeout_minutes) as ranks:
        sharded, common = ranks.everywhere(
            "collect state", lambda: split_for_saving(sharded_state(model, optimizer, is_loading=False))
        )
        needed_bytes = sum(ranks.gather("measure state", lambda: bytes_to_write(sharded)))
        ranks.on_first("take the folder", lock.take)
        try:
            staging, sequence = ranks.on_first(
                "make the temporary folder",
                lambda: folders.prepare_staging(directory, iteration, needed_bytes),
            )
            with _whole_or_removed(ranks, staging, iteration, needed_bytes):
                ranks.everywhere("find the temporary folder", lambda: _check_visible(staging, ranks.rank))
                write_state(ranks, staging, sharded, common)
                _write_run(ranks, staging, progress, config, scheduler)
                files = _hash_all(ranks, staging)
                manifest = Manifest(iteration, sequence, current_layout(), files)
                ranks.on_first("write the manifest", lambda: write_manifest(staging, manifest))
                ranks.on_first("take the folder", lock.take)
                path = ranks.on_first("publish", lambda: folders.publish(staging, iteration))
            ranks.on_first("delete old checkpoints", lambda: folders.remove_old(directory, keep_last))
        finally:
            lock.release()
    if ranks.rank == 0:
        logger.info("saved %s (%.1f MB)", path, manifest.bytes / 1e6)
    return path


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


def current_layout() -> Layout:
    """The parallel layout of this process."""
    return Layout(
        device="cuda" if torch.cuda.is_available() else "cpu",
        world_size=torch.distributed.get_world_size(),
        tensor=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
        context=parallel_state.get_context_parallel_world_size(),
        data=parallel_state.get_data_parallel_world_size(),
    )


def rng_file(rank: int) -> str:
    """Where a rank's random states are, relative to the checkpoint."""
    return f"rng/rank_{rank:05d}.safetensors"


def _check_visible(staging: Path, rank: int) -> None:
    if not staging.is_dir():
        raise CheckpointError(
            f"checkpoint.save: rank {rank} does not see {staging}, which rank 0 has made; the directory must "
            "be on a file system that all nodes share"
        )


def _write_run(
    ranks: Agreement,
    staging: Path,
    progress: Mapping[str, Any],
    config: Mapping[str, Any],
    scheduler: OptimizerParamScheduler | None,
) -> None:
    """Writes everything that is not a tensor of model or optimizer."""

    def write_json() -> None:
        contents = {CONFIG_NAME: config, PROGRESS_NAME: progress}
        if scheduler is not None:
            contents[SCHEDULER_NAME] = scheduler.state_dict()
        for name, content in contents.items():
            write_file(staging / name, json.dumps(content, indent=1).encode())

    def write_rng() -> None:
        path = staging / rng_file(ranks.rank)
        path.parent.mkdir(exist_ok=True)
        write_file(path, safetensors.torch.save(rng_states()))

    ranks.on_first("write the run's settings", write_json)
    ranks.everywhere("write random states", write_rng)


def _hash_all(ranks: Agreement, staging: Path) -> dict[str, FileEntry]:
    """Size and hash of every file. Each rank hashes what it has written itself, from its node's memory, and
    makes it durable."""

    def hash_own() -> dict[str, FileEntry]:
        own = [name for name in list_files(staging) if _writer_of(name) == ranks.rank]
        for name in own:
            sync_file(staging / name)
        return hash_files(staging, own)

    files = {name: entry for part in ranks.gather("hash files", hash_own) for name, entry in part.items()}
    ranks.on_first(
        "sync the folder of random states", lambda: sync_file(staging / "rng")
    )  # the other by the manifest
    return dict(sorted(files.items()))


def _writer_of(name: str) -> int:
    match = _FILE_OF_RANK.fullmatch(name)
    return int(match.group(1)) if match else 0


def _measure_and_remove(staging: Path) -> int:
    free_bytes = shutil.disk_usage(staging.parent).free
    shutil.rmtree(staging, ignore_errors=True)
    return free_bytes
