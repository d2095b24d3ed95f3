"""Whose files are at the prefix of a dataset: nothing is replaced or deleted but what a dataset left there.

A dataset is PREFIX.bin, PREFIX.idx and PREFIX.dataset.json. The files are written in a folder,
.NAME.unfinished, and then moved to their places, the description last. So files without a description are
somebody else's, unless the description still waits in that folder.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from megatron_ext.atomic import move, sync_file
from megatron_ext.data.description import existing_manifest, is_description, manifest_path
from megatron_ext.errors import ConfigError

MAGIC = b"MMIDIDX\x00\x00"
"""How PREFIX.idx begins."""

_WORKING_NAMES = {"bin", "idx", "lengths", "dataset.json"}


class OutputFiles:
    """The files of one dataset."""

    def __init__(self, prefix: str) -> None:
        path = Path(prefix)
        self.prefix = prefix
        self.folder = path.with_name(f".{path.name}.unfinished")
        self._places = {
            "bin": Path(f"{prefix}.bin"),
            "idx": Path(f"{prefix}.idx"),
            "dataset.json": manifest_path(prefix),
        }

    def begin(self) -> Path:
        """Make the folder to write in, empty. Raises ConfigError if something else has its name."""
        if self._check_folder():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        return self.folder

    def finish(self, description: bytes) -> None:
        """Give what was written its place, and the description, if any, after it."""
        (self.folder / "lengths").unlink()
        if description:
            unnamed = self.folder / "description"
            unnamed.write_bytes(description)
            sync_file(unnamed)
            move(unnamed, self.folder / "dataset.json")
        self._move_all()

    def finish_interrupted(self) -> None:
        """Do what was left to do when a process ended in the middle of `finish`."""
        if self._check_folder() and (self.folder / "dataset.json").exists():
            self._move_all()

    def _move_all(self) -> None:
        for name, place in self._places.items():
            if (self.folder / name).exists():
                (self.folder / name).replace(place)
        sync_file(self.folder.parent)
        self.folder.rmdir()

    def abandon(self) -> None:
        """Delete what was not finished."""
        if not (self.folder / "dataset.json").exists():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _check_folder(self) -> bool:
        """Whether the folder is there."""
        if not self.folder.exists() and not self.folder.is_symlink():
            return False
        if self.folder.is_symlink() or not self.folder.is_dir():
            raise _foreign(self.folder, "is not the folder in which datasets are written")
        names = {path.name for path in self.folder.iterdir()} - _WORKING_NAMES - {"description"}
        if names:
            raise _foreign(self.folder, f"holds {min(names)}, which no dataset needs")
        return True

    def check_ours(self) -> None:
        """Raises ConfigError if a file is in the way that is not of a dataset of ours."""
        self._check_folder()
        for path in self._places.values():
            if path.is_symlink() and not path.exists():
                raise _foreign(path, "is a link that leads to no file")
            if path.exists() and not path.is_file():
                raise _foreign(path, "is no plain file")
        description, index = self._places["dataset.json"], self._places["idx"]
        if description.exists() and not is_description(description):
            raise _foreign(description, "does not describe a dataset")
        if index.exists() and index.stat().st_size and not _has_magic(index):
            raise _foreign(index, "is no index of a dataset")
        if existing_manifest(self.prefix) is None and not (self.folder / "dataset.json").exists():
            for path in (self._places["bin"], index):
                if path.exists():
                    raise _foreign(
                        path, f"has no {description.name} beside it that says it is a dataset of ours"
                    )

    def remove(self) -> None:
        """Delete the dataset, which `check_ours` has found to be ours, PREFIX.json included."""
        description = existing_manifest(self.prefix)
        for path in (self._places["bin"], self._places["idx"], description):
            if path is not None:
                path.unlink(missing_ok=True)
        if (earlier := existing_manifest(self.prefix)) is not None:
            earlier.unlink()
        if self.folder.is_dir():
            shutil.rmtree(self.folder)

    def paths(self) -> list[Path]:
        """All that is written or deleted."""
        earlier = existing_manifest(self.prefix)
        return [*self._places.values(), self.folder, *([] if earlier is None else [earlier])]


def _has_magic(index: Path) -> bool:
    with index.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _foreign(path: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{path} is in the way and {what}, so it is not replaced, with --overwrite neither. Give another "
        "--output-prefix."
    )


def existing_prefixes(prefix: str, keys: Sequence[str], *, sharded: bool) -> list[str]:
    """Prefixes at which there are files of a dataset, or of anything of such a name: PREFIX and PREFIX_KEY
    (`keys` are those endings), or those of the shards, PREFIX-00000 and so on, with such an ending."""
    path = Path(prefix)
    shard = r"-\d{5,}" if sharded else ""
    endings = "|".join(map(re.escape, keys))
    name = re.compile(
        rf"\.?({re.escape(path.name)}{shard}({endings}))\.(bin|idx|dataset\.json|json|unfinished)"
    )
    matches = (name.fullmatch(entry.name) for entry in path.parent.glob("*"))
    return sorted({str(path.with_name(match[1])) for match in matches if match})


def refuse_inputs(prefixes: Iterable[str], inputs: Sequence[str]) -> None:
    """Raises ConfigError if a file that would be written or deleted is one of `inputs`, by whatever path."""
    for prefix in prefixes:
        for path in OutputFiles(prefix).paths():
            if _is_one_of(path, inputs):
                raise ConfigError(
                    f"--output-prefix {prefix} would replace the input {path}. Give another --output-prefix."
                )


def _is_one_of(path: Path, others: Sequence[str]) -> bool:
    if any(path.resolve() == Path(other).resolve() for other in others):
        return True
    return path.exists() and any(Path(other).exists() and path.samefile(other) for other in others)


def check_replaceable(output: Path, inputs: Sequence[str], is_ours: Callable[[Path], bool]) -> None:
    """For programs that write one file, --output: raises ConfigError if it is one of `inputs`, or there and
    not, by its content, something that the program made."""
    if _is_one_of(output, inputs):
        raise ConfigError(f"--output {output} would replace an input. Give another --output.")
    if os.path.lexists(output) and not (output.is_file() and is_ours(output)):
        raise ConfigError(
            f"--output {output} is there already and was not made by this program, so it is not replaced. "
            "Give another --output."
        )
