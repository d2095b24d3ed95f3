"""Directories of arrays that are built once and then only read, by any number of processes and runs.

A directory is named after all that its contents depend on, is built under another name and then renamed. So
it is never seen half-built, and never used for a dataset that has changed since.
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.errors import ConfigError

CACHE_NAME = "index_cache"


def cache_parent(data_cache_path: str | None, prefix: str) -> Path:
    """Where indices of the dataset `prefix` are kept:
    `data_cache_path`, or a directory beside the dataset."""
    return Path(data_cache_path) if data_cache_path else Path(prefix).absolute().parent / CACHE_NAME


def cached_directory(
    parent: Path, name: str, depends_on: Mapping[str, Any], build: Callable[[Path], None]
) -> Path:
    """The directory in `parent` for `depends_on`; if it is not there yet, `build` fills it.

    Raises ConfigError if the directory cannot be written.
    """
    description = json.dumps(depends_on, indent=1, sort_keys=True)
    directory = parent.absolute() / f"{name}-{hashlib.sha256(description.encode()).hexdigest()[:16]}"
    if directory.is_dir():
        return directory
    unfinished = directory.with_name(f"{directory.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        build(unfinished)
        (unfinished / "depends_on.json").write_text(description, encoding="utf-8")
        _rename(unfinished, directory)
    except OSError as error:
        raise ConfigError(
            f"cannot write the sample indices into {parent} ({error}). Set data.data_cache_path to a "
            "directory that can be written, has space, and is seen by every node."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def _rename(unfinished: Path, directory: Path) -> None:
    try:
        unfinished.rename(directory)
    except OSError:
        if not directory.is_dir():  # else another run has built the same in the meantime
            raise


class ArrayFile:
    """Writes a .npy file block by block, with an ordinary error
    on a full disk (a memory map would kill the process)."""

    def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self._dtype = dtype
        self._file = path.open("wb")
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(self._file, header)

    def write(self, block: np.ndarray) -> None:
        """Append the next elements."""
        self._file.write(np.ascontiguousarray(block, self._dtype).data)

    def close(self) -> None:
        """Put all on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def save_array(path: Path, array: np.ndarray) -> None:
    """Write one .npy file."""
    file = ArrayFile(path, array.dtype, array.shape)
    file.write(array)
    file.close()


def load_array(path: Path) -> np.ndarray:
    """Map a .npy file into memory, read-only. Raises ConfigError if it is missing or damaged."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}). Delete {path.parent} to have the sample indices built again."
        ) from error


def file_states(paths: Iterable[str]) -> dict[str, list[int]]:
    """Size and time of last change (ns) of files: what an index of them depends on."""
    return {path: [(state := Path(path).stat()).st_size, state.st_mtime_ns] for path in paths}
