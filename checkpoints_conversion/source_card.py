"""What the page of a model folder, README.md, says that holds for models made from it too."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from megatron_ext.text_yaml import load_text_yaml

CARD_NAME = "README.md"
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")
"""Files with the terms of a license, which travel with the weights."""

_FIELDS = ("license", "license_name", "license_link", "base_model")
_HUB_CACHE = "models--"


def card_facts(folder: Path | None) -> dict[str, str]:
    """The fields of the license, and `base_model`, in the head of a folder's page; none where there is no
    page, or it says nothing of them."""
    path = folder / CARD_NAME if folder is not None else None
    if path is None or not path.is_file():
        return {}
    parts = path.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    try:
        front = load_text_yaml(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        front = None
    if not isinstance(front, Mapping):
        return {}
    values = {name: _single(front.get(name)) for name in _FIELDS}
    return {name: value for name, value in values.items() if value is not None}


def hub_name(folder: Path) -> str | None:
    """The name on the Hugging Face Hub of a folder in its cache; None for any other folder."""
    for part in folder.absolute().parts:
        owner, separator, name = part.removeprefix(_HUB_CACHE).partition("--")
        if part.startswith(_HUB_CACHE) and separator:
            return f"{owner}/{name}"
    return None


def _single(value: object) -> str | None:
    """A text, also where it is the only one of a list."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return str(value) if isinstance(value, str | int | float) else None
