"""JSON files beside weights."""

import json
from pathlib import Path
from typing import Any

from lckv.errors import ModelError


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises ModelError that names the file where it cannot be read or is not valid JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}.") from error
    except RecursionError:
        raise ModelError(f"{path} holds lists or objects in one another, too deep to be read.") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds one object.

    Raises ModelError as `read_json`, and where the file holds anything else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds {type(content).__name__}; it must be a JSON object.")
    return content
