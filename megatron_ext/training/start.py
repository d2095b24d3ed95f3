"""What a run starts from, and the folder that it saves into: both are settled before the model is built.

checkpoint.save   checkpoint.load     the run starts
holds none        any or none         from checkpoint.load, with checkpoint.finetune, or from nothing
holds some        outside of save     from the newest in checkpoint.save, with all of its state: the first
                                      start used checkpoint.load and checkpoint.finetune (`never`: refused)
holds some        save, or one in it  from checkpoint.load, with checkpoint.finetune: asked for by name
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.checkpointing.agreement import agreement
from megatron_ext.checkpointing.errors import NoCheckpointError, UnwritableFolderError, unwritable
from megatron_ext.checkpointing.folders import (
    check_free_space,
    find_candidates,
    is_checkpoint,
    list_checkpoints,
    remove_leftovers,
)
from megatron_ext.checkpointing.lock import FolderLock
from megatron_ext.command_line import save_config
from megatron_ext.config import CheckpointConfig, RunConfig
from megatron_ext.errors import ConfigError
from megatron_ext.model.memory import checkpoint_bytes
from megatron_ext.parallel.flight_recorder import make_folder
from megatron_ext.parallel.process_groups import device_of_rank
from megatron_ext.precision import precision

_SETTINGS_NAME = "run.yaml"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    load: str | None
    """One checkpoint or a directory of them; None: from nothing."""
    finetune: bool
    """Take only its weights."""
    goes_on: bool
    """Whether `load` is checkpoint.save because it holds checkpoints, not because checkpoint.load says so."""

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Errors of loading say why this was loaded."""
        try:
            yield
        except ConfigError as error:
            if not self.goes_on:
                raise
            raise type(error)(
                f"{error}\ncheckpoint.save {self.load} holds checkpoints, so this run goes on from them. "
                "For a new run choose another checkpoint.save"
            ) from error


def choose_start(checkpoint: CheckpointConfig) -> Start:
    """What `checkpoint` means now.

    Raises ConfigError where checkpoint.save holds checkpoints and checkpoint.resume is never (keep_last would
    delete them), NoCheckpointError where there is nothing to load.
    """
    if checkpoint.save is None or _is_inside(checkpoint.load, checkpoint.save):
        start = Start(checkpoint.load, checkpoint.finetune, goes_on=False)
    elif existing := list_checkpoints(Path(checkpoint.save)):
        if checkpoint.resume == "never":
            raise ConfigError(
                f"checkpoint.save {checkpoint.save} holds checkpoints of another run "
                f"({existing[-1].path.name} and {len(existing) - 1} more) and checkpoint.resume is never. To "
                "go on from them set it to auto; for a new run choose another checkpoint.save."
            )
        start = Start(checkpoint.save, finetune=False, goes_on=True)
    elif checkpoint.resume == "must":
        raise NoCheckpointError(
            f"checkpoint.resume is must and checkpoint.save {checkpoint.save} holds no checkpoint. Give the "
            "folder of the run to go on with, or set checkpoint.resume to auto to start it"
        )
    else:
        start = Start(checkpoint.load, checkpoint.finetune, goes_on=False)
    if start.load is not None:
        find_candidates(Path(start.load))
    return start


def _is_inside(load: str | None, save: str) -> bool:
    """Whether checkpoint.load is checkpoint.save or a checkpoint in it."""
    if load is None:
        return False
    loaded, saved = Path(load).resolve(), Path(save).resolve()
    return saved in (loaded, loaded.parent)


@contextmanager
def prepared(checkpoint: CheckpointConfig) -> Iterator[Start]:
    """Takes checkpoint.save for this run until the end of the context, and says what to start from. Needs
    process groups; all ranks call it together.

    Raises the same error on all ranks: ConfigError and CheckpointError as `choose_start` and
    `FolderLock.take` do.
    """
    lock = None if checkpoint.save is None else FolderLock(Path(checkpoint.save))
    try:
        with agreement(checkpoint.load_timeout_minutes) as ranks:
            if lock is not None:
                ranks.on_first("check checkpoint.save", lambda: _check_is_no_checkpoint(checkpoint.save))
                ranks.on_first("take checkpoint.save", lock.take)
                ranks.on_first("clean up", lambda: remove_leftovers(Path(checkpoint.save or "")))
            start = ranks.on_first("look for checkpoints", lambda: choose_start(checkpoint))
        if start.goes_on:
            instead = "" if checkpoint.load is None else "; checkpoint.load is for the first start"
            logger.info("going on from checkpoint.save %s%s", checkpoint.save, instead)
        yield start
    finally:
        if lock is not None:
            lock.release()


def _check_is_no_checkpoint(save: str | None) -> None:
    if save is not None and is_checkpoint(Path(save)):
        raise UnwritableFolderError(
            f"checkpoint.save: {save} is one checkpoint; give the directory in which checkpoints are: "
            f"{Path(save).absolute().parent}"
        )


def check_space(run: RunConfig, parameters: int, trained: int) -> None:
    """Raises DiskFullError, on all ranks, where the first checkpoint of a model with so many `parameters`, of
    which so many are `trained`, will not fit. All ranks call it together."""
    if run.checkpoint.save is None:
        return
    save = Path(run.checkpoint.save)
    needed_bytes = checkpoint_bytes(parameters, precision(run.train.precision), trained)
    with agreement(run.checkpoint.save_timeout_minutes) as ranks:
        ranks.on_first(
            "measure free space", lambda: check_free_space(save, "the first checkpoint", needed_bytes)
        )


def write_settings(run: RunConfig) -> None:
    """Writes the run's settings beside its checkpoints. All ranks call it together and raise the same
    CheckpointError."""
    if run.checkpoint.save is None:
        return
    path = Path(run.checkpoint.save) / _SETTINGS_NAME

    def write() -> None:
        try:
            save_config(run, path)
            if device_of_rank().type == "cuda" and run.parallel.flight_recorder_entries:
                make_folder(path.parent)
        except OSError as error:
            raise unwritable(path, error) from error

    with agreement(run.checkpoint.save_timeout_minutes) as ranks:
        ranks.on_first("write the run's settings", write)
