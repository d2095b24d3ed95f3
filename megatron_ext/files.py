"""Files that a program will read and write, looked at before it loads anything."""

import tempfile
from pathlib import Path

from megatron_ext.errors import ConfigError


def check_input(option: str, path: Path | None) -> None:
    """Raises ConfigError by name where the file that `option` names cannot be read; None was not given."""
    if path is None:
        return
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be read: {error.strerror}; give another file.") from error


def check_output(option: str, path: Path | None) -> None:
    """Raises ConfigError by name where the file that `option` names cannot be written; None was not given."""
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a folder; give the name of a file.")
    if not path.parent.is_dir():
        raise ConfigError(
            f"{option} {path}: the folder {path.parent} does not exist; make it, or choose another."
        )
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"{option} {path}: nothing can be written into {path.parent}: {error.strerror}; choose another."
        ) from error
