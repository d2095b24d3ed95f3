"""Directories of arrays that are built once and then only read, by any number of processes and runs.

A directory is named after all that its contents depend on, is built under another name and then renamed. So
it is never seen half-built, and never used for a dataset that has changed since. The hashes of its files are
checked before it is used again.
"""

import hashlib
import io
import json
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.data.open_file import OpenFile, OpenFiles, too_many_files
from megatron_ext.errors import ConfigError

CACHE_NAME = "index_cache"
_LABEL_NAME = "index.json"
_HEADER_VERSION = (2, 0)
_HEADER_BYTES = 4096
"""More than the headers of `ArrayFile` have."""


def cache_parent(data_cache_path: str | None, prefix: str) -> Path:
    """Where indices of the dataset `prefix` are kept:
    `data_cache_path`, or a directory beside the dataset."""
    return Path(data_cache_path) if data_cache_path else Path(prefix).absolute().parent / CACHE_NAME


def cached_directory(
    parent: Path, name: str, depends_on: Mapping[str, Any], build: Callable[[Path], None]
) -> Path:
    """The directory in `parent` for `depends_on`; if it is not there yet, `build` fills it.

    Raises ConfigError if the directory cannot be written, or is there and damaged.
    """
    description = json.dumps(depends_on, sort_keys=True)
    directory = parent.absolute() / f"{name}-{hashlib.sha256(description.encode()).hexdigest()[:16]}"
    if directory.is_dir():
        _check_contents(directory)
        return directory
    unfinished = directory.with_name(f"{directory.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        build(unfinished)
        label = {"depends_on": depends_on, "contents": _hashes(unfinished)}
        (unfinished / _LABEL_NAME).write_text(json.dumps(label, indent=1), encoding="utf-8")
        _rename(unfinished, directory)
    except OSError as error:
        raise too_many_files(directory, error) or ConfigError(
            f"cannot write the sample indices into {parent} ({error}). Set data.data_cache_path to a "
            "directory that can be written, has space, and is seen by every node."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def _hashes(directory: Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(directory.glob("*.npy")):
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _check_contents(directory: Path) -> None:
    label = directory / _LABEL_NAME
    try:
        expected, present = json.loads(label.read_bytes())["contents"], _hashes(directory)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise too_many_files(label, error) or ConfigError(
            f"{label}: cannot be read ({error}). {_remedy(directory)}"
        ) from error
    if expected != present:
        names = [name for name in {**expected, **present} if expected.get(name) != present.get(name)]
        raise ConfigError(
            f"{directory / names[0]}: its content is not what was written. {_remedy(directory)}"
        )


def _remedy(directory: Path) -> str:
    return f"Delete {directory} to have the sample indices built again."


def _rename(unfinished: Path, directory: Path) -> None:
    try:
        unfinished.rename(directory)
    except OSError:
        if not directory.is_dir():  # else another run has built the same in the meantime
            raise


class ArrayFile:
    """Writes a .npy file block by block, with an ordinary error on a full disk (a memory map would kill the
    process). It is not forced onto the disk: a directory's hashes tell what a power cut has damaged, and
    blends have thousands of files."""

    def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self._dtype = dtype
        self._file = path.open("wb")
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(self._file, header)

    def write(self, block: np.ndarray) -> None:
        """Append the next elements."""
        self._file.write(np.ascontiguousarray(block, self._dtype).data)

    def close(self) -> None:
        """No more follows. Raises OSError where something could not be written."""
        self._file.close()


def save_array(path: Path, array: np.ndarray) -> None:
    """Write one .npy file."""
    file = ArrayFile(path, array.dtype, array.shape)
    file.write(array)
    file.close()


class StoredArray:
    """A .npy file of whole numbers, read piece by piece. Its header is read when it is needed first."""

    def __init__(self, path: Path, files: OpenFiles | None = None) -> None:
        """`files`: with which others it shares descriptors. Raises ConfigError if the file is missing."""
        self._file = OpenFile(path, _remedy(path.parent), files)

    @property
    def shape(self) -> tuple[int, ...]:
        """Raises ConfigError if the file is not as long as its header says."""
        return self._header[0]

    @cached_property
    def _header(self) -> tuple[tuple[int, ...], np.dtype, int]:
        """Shape, type, and the byte at which the numbers begin."""
        size = self._file.size
        try:
            file = io.BytesIO(self._file.read(0, min(size, _HEADER_BYTES)))
            version = np.lib.format.read_magic(file)
            if version != _HEADER_VERSION:
                raise ValueError(f"version {version} of the format")
            shape, by_column, dtype = np.lib.format.read_array_header_2_0(file)
        except ConfigError:
            raise
        except Exception as error:  # numpy reads the header as Python, and raises whatever that raises
            raise self._file.damaged(f"cannot be read ({error})") from error
        needed = file.tell() + math.prod(shape) * dtype.itemsize
        whole = dtype.kind in "iu" and not by_column and min(shape, default=0) >= 0
        if not whole or needed != size:
            raise self._file.damaged(f"{size} bytes, but its header calls for {needed}")
        return shape, dtype, file.tell()

    def read(self, first: int, count: int) -> np.ndarray:
        """Elements `first` to `first + count` (exclusive), counted row by row; [count], of the file's type.
        Raises ConfigError where there are fewer."""
        _, dtype, begin = self._header
        data = self._file.read(begin + first * dtype.itemsize, count * dtype.itemsize)
        return np.frombuffer(data, dtype)

    def damaged(self, reason: str) -> ConfigError:
        """The error for contents that cannot be."""
        return self._file.damaged(reason)


def file_states(paths: Iterable[str]) -> dict[str, list[int]]:
    """Size and time of last change (ns) of files: what an index of them depends on."""
    return {path: [(state := Path(path).stat()).st_size, state.st_mtime_ns] for path in paths}
