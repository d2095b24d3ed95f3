"""Tables of contents of checkpoints that say what cannot be."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata


def tables_of_contents() -> dict[str, Callable[[Path], object]]:
    """Changes of the newest checkpoint of a folder, by what they try."""
    made: dict[str, Callable[[Metadata], object]] = {
        f"the file {name!r}": _set_places("relative_path", name)
        for name in ("../outside", "/etc/hostname", "..", "", "a/b", 3)
    }
    made |= {
        "places behind the end": _set_places("length", 10**15),
        "places before the beginning": _set_places("offset", -1),
        "places that are one": _set_places("offset", 0),
        "places that are compressed": _set_places("transform_descriptors", ["zstd"]),
        "large tensors": _set_sizes(torch.Size([2**40])),
        "tensors whose size overflows": _set_sizes(torch.Size([2**31, 2**31])),
        "no tensors": lambda metadata: setattr(metadata, "state_dict_metadata", {}),
        "no places": lambda metadata: setattr(metadata, "storage_data", {}),
        "no table": lambda metadata: setattr(metadata, "storage_data", None),
    }
    return {what: _changing(action) for what, action in made.items()}


def _set_places(field: str, value: Any) -> Callable[[Metadata], object]:
    def change(metadata: Metadata) -> None:
        for place in metadata.storage_data.values():
            setattr(place, field, value)

    return change


def _set_sizes(size: torch.Size) -> Callable[[Metadata], object]:
    def change(metadata: Metadata) -> None:
        for entry in metadata.state_dict_metadata.values():
            if isinstance(entry, TensorStorageMetadata):
                entry.size = entry.chunks[0].sizes = size
                entry.chunks[0].offsets = torch.Size([0] * len(size))

    return change


def _changing(action: Callable[[Metadata], object]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = max(folder.glob("iter_*")) / ".metadata"
        metadata = pickle.loads(path.read_bytes())  # noqa: S301 - the campaign's own file
        action(metadata)
        path.write_bytes(pickle.dumps(metadata))

    return change
