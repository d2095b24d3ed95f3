"""A program that is killed while it saves, at every place where that could matter; run by
test_save_faults.py.

    python -m tests.megatron_ext.checkpointing.killed_saves DIRECTORY

For every place, a process saves iteration 1, trains, and is killed in the save of iteration 2, all in
DIRECTORY/place; and once more, with saves in the background and further training meanwhile, in
DIRECTORY/background/place. The weights of both iterations are put beside the directories. One process that
has imported everything forks the others.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from megatron_ext import atomic
from megatron_ext.checkpointing import folders, shards, writing
from megatron_ext.checkpointing.save import saves
from tests.megatron_ext.checkpointing.tiny_gpt import Case, Run


def die(*args: Any, **kwargs: Any) -> NoReturn:
    """Ends the process without any clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def in_the_middle_of_a_file() -> None:
    write = shards.Shards.write

    def write_half(written: Any) -> Any:
        write(written)
        os.truncate(written._path, written._path.stat().st_size // 2)
        die()

    shards.Shards.write = write_half  # type: ignore[method-assign]


def in_the_rename_of(name: str) -> Callable[[], None]:
    def install() -> None:
        rename = os.rename

        def rename_or_die(source: Path, target: Path) -> None:
            if Path(target).name == name:
                die()
            rename(source, target)

        os.rename = rename_or_die  # type: ignore[assignment]

    return install


def in_the_middle_of_a_deletion() -> None:
    def delete_one(path: Path) -> None:
        (path / "__0_0.distcp").unlink()
        die()

    atomic.shutil.rmtree = delete_one  # type: ignore[assignment]


def instead_of(module: Any, name: str) -> Callable[[], None]:
    return lambda: setattr(module, name, die)


PLACES: dict[str, Callable[[], None]] = {
    "after the temporary folder": instead_of(writing, "plan_writing"),
    "before the files": instead_of(writing, "write_state"),
    "in the middle of a file": in_the_middle_of_a_file,
    "after half of the files": instead_of(writing, "_write_files"),
    "before the hashes": instead_of(writing, "_hash_files"),
    "before the table of contents": instead_of(writing, "write_contents"),
    "before the manifest": instead_of(writing, "write_manifest"),
    "in the manifest": in_the_rename_of("manifest.json"),
    "before the rename": instead_of(folders, "publish"),
    "before the pointer": instead_of(folders, "write_pointer"),
    "in the pointer": in_the_rename_of("latest"),
    "before the deletion": instead_of(folders, "remove_old"),
    "in the deletion": in_the_middle_of_a_deletion,
}


BACKGROUND = "background"


def run(directory: Path, install: Callable[[], None], *, in_background: bool) -> None:
    """Saves twice; dies in the second."""
    program = Run(Case())
    program.train(1)
    program.save(directory, 1, keep_last=1)
    torch.save(program.weights(), directory.parent / "weights1.pt")
    program.train(1)
    torch.save(program.weights(), directory.parent / "weights2.pt")
    with saves(directory, keep_last=1, in_background=in_background) as made:
        install()
        made.save(2, program.state(2))
        program.train(1)


def main(directory: Path) -> None:
    """Runs all places, each in a process of its own."""
    torch.set_num_threads(1)
    (directory / BACKGROUND).mkdir()
    for place, install in PLACES.items():
        for folder in (directory, directory / BACKGROUND):
            process = os.fork()
            if process == 0:
                try:
                    run(folder / place, install, in_background=folder != directory)
                finally:
                    os._exit(3)
            _, status = os.waitpid(process, 0)
            if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
                raise SystemExit(f"{folder / place}: the process was not killed, status {status}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
