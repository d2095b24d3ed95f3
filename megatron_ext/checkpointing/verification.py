"""What can be wrong with a checkpoint, found before any of it is used.

Everything that loading reads is listed in the manifest, and is what the manifest says. Large files are only
hashed on request; all others always are.
"""

from pathlib import Path

from lckv.errors import ModelError
from lckv.weights.json_file import read_json_object
from megatron_ext.checkpointing.contents import CONTENTS_NAME, files_named, read_contents
from megatron_ext.checkpointing.errors import DamagedCheckpointError
from megatron_ext.checkpointing.manifest import (
    Manifest,
    find_wrong_hashes,
    find_wrong_sizes,
    list_files,
    read_manifest,
)

CONFIG_NAME = "config.json"
PROGRESS_NAME = "progress.json"
SCHEDULER_NAME = "scheduler.json"
COMMON_NAME = "common.pt"
"""Megatron's COMMON_STATE_FNAME. Megatron takes seconds to load, and looking at files does not need it."""

_NEEDED = (CONTENTS_NAME, COMMON_NAME, CONFIG_NAME, PROGRESS_NAME)
_JSON = (CONFIG_NAME, PROGRESS_NAME, SCHEDULER_NAME)
_LARGE = ".distcp"


def find_problems(checkpoint: Path) -> tuple[Manifest | None, list[str]]:
    """(the manifest, None where it cannot be read; what is wrong, each as a sentence), without the hashes of
    `large_files`."""
    try:
        manifest = read_manifest(checkpoint)
    except DamagedCheckpointError as error:
        return None, [str(error)]
    problems = _unlisted(checkpoint, manifest) or find_wrong_sizes(checkpoint, manifest)
    if not problems:
        small = manifest.files.keys() - large_files(manifest).keys()
        problems = find_wrong_hashes(checkpoint, manifest, sorted(small))
    return manifest, problems or _unreadable(checkpoint, manifest)


def large_files(manifest: Manifest) -> dict[str, int]:
    """The files of weights and of the optimizer, with their sizes in bytes."""
    return {name: entry.bytes for name, entry in manifest.files.items() if name.endswith(_LARGE)}


def _unlisted(checkpoint: Path, manifest: Manifest) -> list[str]:
    """Files that loading reads, or might, and that the manifest does not speak of."""
    problems = [f"its manifest does not list {name}" for name in _NEEDED if name not in manifest.files]
    others = [name for name in list_files(checkpoint) if name not in manifest.files and name not in _NEEDED]
    used = [name for name in others if name in _JSON or name.endswith(_LARGE) or name.startswith("rng/")]
    return problems + [f"its manifest does not list {name}" for name in used]


def _unreadable(checkpoint: Path, manifest: Manifest) -> list[str]:
    """Files that are as they were written, but not what they must be."""
    try:
        named = files_named(read_contents(checkpoint))
        for name in _JSON:
            if name in manifest.files:
                read_json_object(checkpoint / name)
    except (DamagedCheckpointError, ModelError) as error:
        return [str(error)]
    return [f"its manifest does not list {name}" for name in sorted(named - manifest.files.keys())]
