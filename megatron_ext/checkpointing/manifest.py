"""The manifest of a checkpoint: its last file to be written, which says what the others must be.

manifest.json holds the schema version, the iteration, the parallel layout, a running number, and size and
sha256 of every other file; a hash of its own content comes last. A folder without a valid manifest is not a
checkpoint.

The hashes find damage, not malice: who can change a file can change the manifest. Reading is safe all the
same, see `reading.py`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lckv.plain_files import is_plain_name, open_plain, plain_size, read_plain
from lckv.weights.json_file import parse_json
from megatron_ext.atomic import write_file
from megatron_ext.checkpointing.errors import DamagedCheckpointError

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1
_HASHING_THREADS = 4
_PIECE_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Layout:
    """How ranks are arranged: the sizes of the parallel groups, and on what they run."""

    device: str
    """Type of device: cpu or cuda. Their random states cannot be exchanged."""
    world_size: int
    tensor: int
    pipeline: int
    context: int
    data: int
    stages: str = ""
    """Layers of each pipeline stage, where they are not equally many in one stretch, as in 0-2 | 3-7."""

    def __str__(self) -> str:
        layers = f" with layers {self.stages}" if self.stages else ""
        sizes = f"TP {self.tensor}, PP {self.pipeline}{layers}, CP {self.context}, DP {self.data}"
        return f"{self.world_size} {self.device} rank(s) ({sizes})"


@dataclass(frozen=True)
class FileEntry:
    """What a file must be."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    iteration: int
    """Optimizer steps done when it was saved."""

    sequence: int
    """Higher than that of every checkpoint that was in the directory before:
    the order of saving, without a clock."""

    layout: Layout
    files: Mapping[str, FileEntry]
    """By path relative to the checkpoint, with slashes."""

    @property
    def bytes(self) -> int:
        """Size of the checkpoint, without the manifest."""
        return sum(entry.bytes for entry in self.files.values())


def write_manifest(checkpoint: Path, manifest: Manifest) -> None:
    """Writes manifest.json, in full or not at all."""
    content = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(manifest)}
    content["sha256"] = _own_hash(content)
    write_file(checkpoint / MANIFEST_NAME, json.dumps(content, indent=1).encode())


def read_manifest(checkpoint: Path) -> Manifest:
    """Reads manifest.json of one checkpoint. Raises DamagedCheckpointError with the reason."""
    path = checkpoint / MANIFEST_NAME
    try:
        content = parse_json(read_plain(path))
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedCheckpointError(
            f"{MANIFEST_NAME} is missing: saving did not finish, or it was deleted"
        ) from None
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(f"{MANIFEST_NAME} cannot be read: {error}") from error
    try:
        version, own_hash = content.pop("schema_version"), content.pop("sha256")
        if version != SCHEMA_VERSION:
            raise DamagedCheckpointError(
                f"{MANIFEST_NAME} has schema version {version}; this program reads version {SCHEMA_VERSION}"
            )
        if own_hash != _own_hash({"schema_version": version, **content}):
            raise DamagedCheckpointError(f"{MANIFEST_NAME} is damaged: its own hash does not fit its content")
        files = {name: FileEntry(**entry) for name, entry in content.pop("files").items()}
        manifest = Manifest(layout=Layout(**content.pop("layout")), files=files, **content)
    except (AttributeError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{MANIFEST_NAME} is damaged: {error!r}") from error
    _check_values(manifest)
    return manifest


def _check_values(manifest: Manifest) -> None:
    device, *sizes, stages = dataclasses.astuple(manifest.layout)
    numbers = [manifest.iteration, manifest.sequence, *sizes]
    numbers += [entry.bytes for entry in manifest.files.values()]
    texts = [device, stages, *(entry.sha256 for entry in manifest.files.values())]
    if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
        raise DamagedCheckpointError(f"{MANIFEST_NAME} is damaged: a number in it is none, or out of range")
    if not all(isinstance(text, str) for text in texts):
        raise DamagedCheckpointError(f"{MANIFEST_NAME} is damaged: a text in it is none")
    for name in manifest.files:
        if not all(map(is_plain_name, name.split("/"))):
            raise DamagedCheckpointError(f"{MANIFEST_NAME} names a file outside of the checkpoint: {name}")


def list_files(checkpoint: Path) -> list[str]:
    """Every file below the checkpoint except the manifest, relative to it, sorted."""
    files = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    return sorted(name for name in files if name != MANIFEST_NAME)


def hash_files(
    checkpoint: Path, names: Iterable[str], progress: Callable[[int], None] | None = None
) -> dict[str, FileEntry]:
    """Size and sha256 of files, read in pieces by a few threads.
    Any of them calls `progress` with the bytes just read."""
    names = list(names)
    with ThreadPoolExecutor(_HASHING_THREADS) as threads:
        entries = threads.map(lambda name: _hash_file(checkpoint / name, progress), names)
        return dict(zip(names, entries, strict=True))


def find_wrong_sizes(checkpoint: Path, manifest: Manifest) -> list[str]:
    """Files that are missing or have another size than the manifest says, each as a sentence."""
    problems = []
    for name, entry in manifest.files.items():
        try:
            size = plain_size(checkpoint / name)
        except OSError as error:
            problems.append(
                f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {error}"
            )
            continue
        if size != entry.bytes:
            problems.append(f"{name} has {size:,} bytes instead of {entry.bytes:,}")
    return problems


def find_wrong_hashes(
    checkpoint: Path, manifest: Manifest, names: Iterable[str], progress: Callable[[int], None] | None = None
) -> list[str]:
    """Those of the named files whose content is not the one that was written, each as a sentence; `progress`
    as for `hash_files`."""
    try:
        entries = hash_files(checkpoint, names, progress)
    except OSError as error:
        return [f"reading fails: {error}"]
    return [
        f"{name} has changed (sha256 differs)"
        for name, entry in entries.items()
        if entry != manifest.files[name]
    ]


def share_of_rank(sizes: Mapping[str, int], rank: int, world_size: int) -> list[str]:
    """The files that a rank reads when all ranks share the work,
    so that every rank has about the same number of bytes."""
    loads = [0] * world_size
    share = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        loads[least] += sizes[name]
        if least == rank:
            share.append(name)
    return share


def _hash_file(path: Path, progress: Callable[[int], None] | None) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    with open_plain(path, buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
            size += len(piece)
            if progress is not None:
                progress(len(piece))
    return FileEntry(size, digest.hexdigest())


def _own_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
