"""JSON files beside weights."""

import json
from pathlib import Path
from typing import Any

from lckv.errors import ModelError
from lckv.plain_files import read_plain

MAX_BYTES = 512 * 2**20
"""A JSON file that is larger is refused: its objects would take many times that much memory."""


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises ModelError that names the file where it cannot be read or is not valid JSON.
    """
    try:
        return parse_json(read_plain(path, MAX_BYTES))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error
    except JsonError as error:
        raise ModelError(f"{path} is not valid JSON: {error}.") from error


class JsonError(ValueError):
    """Text that is not JSON, or none that a program wrote."""


def parse_json(text: bytes | str) -> Any:
    """The value that a text in JSON is.

    Raises JsonError where it is none, also where it is nested too deep for Python.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise JsonError("it is nested too deep") from None
    except ValueError as error:
        raise JsonError(str(error)) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds one object.

    Raises ModelError as `read_json`, and where the file holds anything else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds {type(content).__name__}; it must be a JSON object.")
    return content
