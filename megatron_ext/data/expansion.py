"""Which files an input stands for: a file, a folder as the glob of all that is in it, a glob."""

import os
import stat
from collections.abc import Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path

from megatron_ext.errors import ConfigError


def expand(entry: str, suffixes: Sequence[str] = ()) -> list[Path]:
    """The files that `entry` stands for, sorted; those whose names end with one of `suffixes`, if any.

    Of a folder all files are taken, those of its subfolders and behind links too, hidden ones excepted; of a
    glob the folders that match as well. Raises ConfigError if there is none, and for what cannot be read
    twice: pipes, devices, links that lead nowhere.
    """
    every = _files(entry)
    kept = sorted(path for path in every if not suffixes or path.name.endswith(tuple(suffixes)))
    if not kept:
        hint = f"; no name ends with {' or '.join(suffixes)}" if every else ""
        raise ConfigError(
            f"input {entry!r} stands for no file{hint}. Give files, globs or directories that exist."
        )
    for path in kept:
        _check_regular(path)
    return kept


def _files(entry: str) -> list[Path]:
    path = Path(entry)
    if path.is_dir():
        return list(_inside(path))
    if os.path.lexists(path) or not has_magic(entry):
        return [path] if os.path.lexists(path) else []
    matches = [Path(match) for match in glob(entry, recursive=True)]
    recursive = "**" in entry  # then what is in the folders matches by itself
    folders = [] if recursive else [match for match in matches if match.is_dir()]
    files = [match for match in matches if not match.is_dir()]
    return [*files, *(file for folder in folders for file in _inside(folder))]


def _inside(folder: Path) -> Iterator[Path]:
    seen: dict[tuple[int, int], str] = {}
    for directory, subfolders, names in os.walk(folder, onerror=_raise, followlinks=True):
        state = os.stat(directory)
        first = seen.setdefault((state.st_dev, state.st_ino), directory)
        if first != directory:
            raise ConfigError(f"input '{directory}' is a link to '{first}', whose files are taken already.")
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (Path(directory, name) for name in names if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def _check_regular(path: Path) -> None:
    if not path.exists():
        raise ConfigError(f"input '{path}' is a link that leads to no file. Mend it or take it away.")
    if not stat.S_ISREG(path.stat().st_mode):
        raise ConfigError(
            f"input '{path}' is a pipe or a device, which cannot be read twice. Write its content to a file "
            "and give that."
        )


def refuse_repeated(paths: Sequence[Path]) -> None:
    """Raises ConfigError if two paths are the same file: also by way of links and other spellings."""
    seen: dict[tuple[int, int], Path] = {}
    for path in paths:
        state = path.stat()
        first = seen.setdefault((state.st_dev, state.st_ino), path)
        if first is not path:
            raise ConfigError(
                f"input '{path}' is given twice (the same file as '{first}'): its documents would count "
                "twice. Give it once; weights in data.data_path repeat a dataset."
            )
