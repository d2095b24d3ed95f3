"""A directory of checkpoints: names, order, the pointer to the newest, publication and removal.

    DIRECTORY/
      latest                    one line: the name of the newest checkpoint
      iter_0000100/             a checkpoint; it has a manifest from the moment it has this name
      iter_0000200/
      iter_0000200.replaced/    the older one of two saves at one iteration, for the moment of the exchange
      lock.json                 who writes here now, see `lock.py`
      .iter_0000300.OWNER.tmp/  being written by a process of rank 0, or left by a crash
      .iter_0000100.OWNER.trash/
                                being deleted, or left by a crash

All of this is done by rank 0, which holds the lock while it writes. Any of these names may be taken by a
file, a link or a folder that is not ours: links are deleted, not followed, and what cannot be deleted is only
logged.
"""

import dataclasses
import itertools
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lckv.plain_files import read_plain
from lckv.weights.folder_kind import explain_other_kind
from megatron_ext import atomic
from megatron_ext.checkpointing.errors import DamagedCheckpointError, DiskFullError, NoCheckpointError
from megatron_ext.checkpointing.manifest import MANIFEST_NAME, Manifest, find_wrong_sizes, read_manifest
from megatron_ext.checkpointing.owner import TOKEN_PATTERN, is_living_token, this_process

POINTER_NAME = "latest"
_CHECKPOINT = re.compile(r"iter_(\d{7,})(\.replaced)?")
_LEFTOVER = re.compile(
    rf"\.(?:latest|lock|iter_\d{{7,}}(?:\.replaced)?)(?:\.(?P<owner>{TOKEN_PATTERN})(?:\.\d+)?)?\.(?:tmp|trash)"
)
_SHOWN_PROBLEMS = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint of a directory."""

    path: Path
    iteration: int
    manifest: Manifest | None
    """None where it cannot be read."""
    problem: str | None
    """Why it cannot be loaded, as far as names and sizes tell; hashes are checked on loading."""


@dataclass(frozen=True)
class Candidates:
    """What there is to load, best first."""

    checkpoints: tuple[Path, ...]
    may_fall_back: bool
    """Whether the next one may be taken when the first is damaged: not where one was asked for by name."""
    pointer_problem: str | None


def list_checkpoints(directory: Path) -> list[CheckpointInfo]:
    """The checkpoints of a directory in the order in which they were saved; empty where there are none, or no
    directory.

    Those whose manifest cannot be read come last, in order of their iteration.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return [_check_sizes(info) for info in _scan(directory)]


def read_pointer(directory: Path) -> str | None:
    """The name in `latest`, None where there is no such file.
    Raises DamagedCheckpointError when it is not a name."""
    try:
        name = read_plain(directory / POINTER_NAME).decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedCheckpointError(f"{POINTER_NAME} cannot be read: {error}") from error
    if not _CHECKPOINT.fullmatch(name):
        raise DamagedCheckpointError(
            f"{POINTER_NAME} holds {name[:40]!r}, which is not the name of a checkpoint"
        )
    return name


def write_pointer(directory: Path, name: str) -> None:
    """Moves `latest` to the checkpoint of this name."""
    atomic.write_file(directory / POINTER_NAME, f"{name}\n".encode())


def find_candidates(path: Path) -> Candidates:
    """What `checkpoint.load` can mean: one checkpoint, or a directory of them - then `latest` first, then
    newest first.

    Raises NoCheckpointError.
    """
    if other := explain_other_kind(path, "megatron"):
        raise NoCheckpointError(f"checkpoint.load: {other}")
    if not path.is_dir():
        raise NoCheckpointError(
            f"checkpoint.load: {path} is not a directory that exists; give a directory of checkpoints or one "
            "checkpoint"
        )
    if is_checkpoint(path):
        return Candidates((path,), may_fall_back=False, pointer_problem=None)
    newest_first = [info.path for info in reversed(_scan(path))]
    if not newest_first:
        raise NoCheckpointError(
            f"checkpoint.load: {path} holds no checkpoint (folders named iter_0000100 and so on)"
        )
    problem = None
    try:
        name = read_pointer(path)
    except DamagedCheckpointError as error:
        name, problem = None, str(error)
    if name is not None and path / name not in newest_first:
        name, problem = None, f"{POINTER_NAME} names {name}, which is not there"
    if name is not None:
        newest_first.sort(key=lambda checkpoint: checkpoint.name != name)
    return Candidates(tuple(newest_first), may_fall_back=True, pointer_problem=problem)


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is one checkpoint and not a directory of them."""
    return bool(_CHECKPOINT.fullmatch(path.name)) or (path / MANIFEST_NAME).exists()


def choose_checkpoint(
    path: Path, candidates: Candidates, verify: Callable[[Path], tuple[Manifest | None, Sequence[str]]]
) -> tuple[Path, Manifest, str | None]:
    """The best of the candidates of `path` that is not damaged, and why better ones were passed over, None
    where there are none.

    `verify` returns a checkpoint's manifest, None where it cannot be read, and all that is wrong.
    Raises DamagedCheckpointError.
    """
    tried = [candidates.pointer_problem] if candidates.pointer_problem is not None else []
    for checkpoint in candidates.checkpoints:
        manifest, problems = verify(checkpoint)
        if manifest is not None and not problems:
            fallback = f"{'; '.join(tried)}. Falling back to {checkpoint} (iteration {manifest.iteration})"
            return checkpoint, manifest, fallback if tried else None
        more = len(problems) - _SHOWN_PROBLEMS
        shown = ", ".join(problems[:_SHOWN_PROBLEMS]) + (f" and {more} more" if more > 0 else "")
        tried.append(f"{checkpoint} is damaged: {shown}")
    if not candidates.may_fall_back:
        raise DamagedCheckpointError(
            f"checkpoint.load: {tried[0]}. Load another one, or the directory to take the newest good one"
        )
    raise DamagedCheckpointError(
        "\n  ".join([f"checkpoint.load: no good checkpoint in {path}; tried:", *tried])
    )


def prepare_staging(directory: Path, iteration: int, needed_bytes: int) -> tuple[Path, int]:
    """Makes the temporary folder of a checkpoint, after removing what crashes have left; returns it and its
    sequence number.

    Raises DiskFullError when the checkpoint will not fit.
    """
    directory.mkdir(parents=True, exist_ok=True)
    remove_leftovers(directory)
    check_free_space(directory, checkpoint_name(iteration), needed_bytes)
    sequences = [info.manifest.sequence for info in _scan(directory) if info.manifest is not None]
    staging = _owned(directory / checkpoint_name(iteration), "tmp")
    staging.mkdir()
    return staging, 1 + max(sequences, default=0)


def remove_leftovers(directory: Path) -> None:
    """Deletes what crashes have left, but not what a living process writes; logs what fails."""
    here = this_process()
    for path in directory.iterdir():
        match = _LEFTOVER.fullmatch(path.name)
        if match and not (match["owner"] and is_living_token(match["owner"], here)):
            logger.warning("removing %s, left by a save that did not finish", path)
            atomic.discard(path)


def check_free_space(directory: Path, name: str, needed_bytes: int) -> None:
    """Raises DiskFullError when the checkpoint `name` will not fit into `directory`."""
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < needed_bytes:
        raise DiskFullError(explain_full_disk(directory, name, needed_bytes, free_bytes))


def explain_full_disk(directory: Path, name: str, needed_bytes: int, free_bytes: int) -> str:
    """The message of a DiskFullError."""
    return (
        f"checkpoint.save: no space for {name} in {directory}: it takes about "
        f"{needed_bytes / 1e6:,.1f} MB, {free_bytes / 1e6:,.1f} MB are free. Earlier checkpoints and "
        f"'{POINTER_NAME}' are as they were. Free some space, lower checkpoint.keep_last, or set "
        "checkpoint.save to another file system"
    )


def publish(staging: Path, iteration: int) -> Path:
    """Gives a complete checkpoint its name and moves the pointer to it; returns its path."""
    directory = staging.parent
    target = directory / checkpoint_name(iteration)
    if os.path.lexists(target):
        replaced = target.with_name(f"{target.name}.replaced")
        if os.path.lexists(replaced):
            _remove(replaced)
        atomic.move(target, replaced)
    atomic.move(staging, target)
    try:
        write_pointer(directory, target.name)
    except IsADirectoryError as error:
        logger.warning(
            "%s cannot be moved: %s. The newest checkpoint is loaded without it", POINTER_NAME, error
        )
    return target


def remove_old(directory: Path, keep_last: int | None) -> None:
    """Deletes all but the last `keep_last` checkpoints (None: none), and one that was replaced.

    What cannot be read is not counted and not touched, nor is the one that `latest` points to. A failure is
    only logged: the new checkpoint is safe.
    """
    try:
        old = _find_old(directory, keep_last)
    except (OSError, DamagedCheckpointError) as error:
        logger.warning("old checkpoints in %s are not deleted: %s", directory, error)
        return
    for path in old:
        _remove(path)


def _find_old(directory: Path, keep_last: int | None) -> list[Path]:
    whole = [info.path for info in _scan(directory) if info.manifest is not None]
    replaced = [path for path in whole if path.name.endswith(".replaced")]
    regular = [path for path in whole if path not in replaced]
    old = replaced + (regular[:-keep_last] if keep_last is not None else [])
    kept = read_pointer(directory) if old else None
    return [path for path in old if path.name != kept]


def _remove(path: Path) -> None:
    """Deletes a checkpoint, or what has the name of one. It first gets another name: a crash cannot leave a
    half that looks like the whole. What fails is only logged."""
    trash = _owned(path, "trash")
    try:
        atomic.move(path, trash)
    except OSError as error:
        logger.warning("%s could not be deleted: %s", path, error)
    else:
        atomic.discard(trash)


def _scan(directory: Path) -> list[CheckpointInfo]:
    """The checkpoints in order of saving, those without a readable manifest last.
    Opens nothing but manifests."""
    checkpoints = []
    for path in directory.iterdir():
        if match := _CHECKPOINT.fullmatch(path.name):
            iteration = int(match.group(1))
            try:
                checkpoints.append(CheckpointInfo(path, iteration, read_manifest(path), None))
            except DamagedCheckpointError as error:
                checkpoints.append(CheckpointInfo(path, iteration, None, str(error)))
    return sorted(
        checkpoints, key=lambda info: (info.manifest.sequence if info.manifest else math.inf, info.iteration)
    )


def _check_sizes(info: CheckpointInfo) -> CheckpointInfo:
    if info.manifest is None:
        return info
    return dataclasses.replace(info, problem="; ".join(find_wrong_sizes(info.path, info.manifest)) or None)


def checkpoint_name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def _owned(path: Path, kind: str) -> Path:
    """A free name beside `path` that says whose it is."""
    base = f".{path.name}.{this_process().token}"
    names = itertools.chain([f"{base}.{kind}"], (f"{base}.{number}.{kind}" for number in itertools.count(1)))
    return next(owned for name in names if not os.path.lexists(owned := path.with_name(name)))
