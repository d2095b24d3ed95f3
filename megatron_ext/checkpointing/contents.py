"""The table of contents of a distributed checkpoint, `.metadata`: which tensors it has, and where they lie.

It is a pickle of torch's dataclasses. It is read as data, and the dataclasses are built here from what it
says, after a look at each value: names of files stay in the folder, sizes and places are within the files.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lckv.plain_files import is_plain_name, plain_size, read_plain
from lckv.weights.pickled_data import ForbiddenNameError, Made, Name, read_pickle
from megatron_ext.checkpointing.errors import DamagedCheckpointError

CONTENTS_NAME = ".metadata"

_MODULE = "torch.distributed.checkpoint.metadata"
_METADATA, _INDEX, _TENSOR, _BYTES, _CHUNK, _PROPERTIES = (
    f"{_MODULE}.{kind.__name__}"
    for kind in (
        Metadata,
        MetadataIndex,
        TensorStorageMetadata,
        BytesStorageMetadata,
        ChunkStorageMetadata,
        TensorProperties,
    )
)
_PLACE = f"{_StorageInfo.__module__}.{_StorageInfo.__qualname__}"
_SIZE = "torch.Size"
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_OF_NO_USE = {
    f"{_MODULE}.StorageMeta",
    f"{_MODULE}._MEM_FORMAT_ENCODING",
    "torch.serialization._get_layout",
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath")
    ),
}
_NAMES = frozenset(
    {_METADATA, _INDEX, _TENSOR, _BYTES, _CHUNK, _PROPERTIES, _PLACE, _SIZE, *_DTYPES, *_OF_NO_USE}
)


def read_contents(checkpoint: Path) -> Metadata:
    """Names, shapes and dtypes of a checkpoint's tensors, and their places. Opens no other file.

    Raises DamagedCheckpointError where it cannot be understood, where it names files outside of the folder or
    that are no files, or places that are not in them.
    """
    path = checkpoint / CONTENTS_NAME
    try:
        metadata = _metadata(read_pickle(read_plain(path), _NAMES))
        _check_places(checkpoint, metadata)
    except ForbiddenNameError as error:
        raise DamagedCheckpointError(
            f"{path} cannot be read: it names {error.name}, which is not part of a table of contents"
        ) from error
    except (UnpicklingError, OSError, IndexError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error
    return metadata


def files_named(metadata: Metadata) -> set[str]:
    """The files with tensors and objects that a table of contents names."""
    return {place.relative_path for place in (metadata.storage_data or {}).values()}


def _metadata(content: Any) -> Metadata:
    fields = _fields(content, _METADATA)
    entries, places = fields.get("state_dict_metadata"), fields.get("storage_data")
    if not isinstance(entries, dict) or not isinstance(places, dict):
        raise UnpicklingError("it has no tensors, or does not say where they are")
    if not all(isinstance(key, str) for key in entries):
        raise UnpicklingError("the name of a tensor is no text")
    return Metadata(
        {key: _entry(key, value) for key, value in entries.items()},
        storage_data={_index(key): _place(value) for key, value in places.items()},
    )


def _fields(part: Any, name: str) -> Mapping[str, Any]:
    """What an object of this class holds."""
    if not isinstance(part, Made) or part.name != name:
        given = part.name if isinstance(part, Made | Name) else type(part).__name__
        raise UnpicklingError(f"it holds a {given} where a {name.rpartition('.')[2]} is needed")
    state = {} if part.state is None else part.state
    if part.arguments or not isinstance(state, dict):
        raise UnpicklingError(f"a {name.rpartition('.')[2]} holds something else than fields")
    return state


def _entry(key: str, part: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(part, Made) and part.name == _BYTES:
        return BytesStorageMetadata()
    fields = _fields(part, _TENSOR)
    size, chunks = _size(fields.get("size")), fields.get("chunks")
    if not isinstance(chunks, list):
        raise UnpicklingError(f"{key} has no chunks")
    return TensorStorageMetadata(
        TensorProperties(dtype=_dtype(key, fields.get("properties"))),
        size,
        [_chunk(key, size, chunk) for chunk in chunks],
    )


def _dtype(key: str, part: Any) -> torch.dtype:
    state = part.state if isinstance(part, Made) and part.name == _PROPERTIES else None
    name = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(name, Name) or name.name not in _DTYPES:
        raise UnpicklingError(f"the dtype of {key} is none")
    return _DTYPES[name.name]


def _chunk(key: str, whole: torch.Size, part: Any) -> ChunkStorageMetadata:
    fields = _fields(part, _CHUNK)
    offsets, sizes = _size(fields.get("offsets")), _size(fields.get("sizes"))
    if not len(offsets) == len(sizes) == len(whole) or any(
        offset + size > length for offset, size, length in zip(offsets, sizes, whole, strict=True)
    ):
        raise UnpicklingError(f"a chunk of {key} is not inside of it")
    return ChunkStorageMetadata(offsets, sizes)


def _size(part: Any) -> torch.Size:
    numbers = part.arguments[0] if isinstance(part, Made) and part.name == _SIZE and part.arguments else None
    if not isinstance(numbers, tuple) or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise UnpicklingError("a size is none")
    return torch.Size(numbers)


def _index(part: Any) -> MetadataIndex:
    fields = _fields(part, _INDEX)
    name, offset, index = (fields.get(field) for field in ("fqn", "offset", "index"))
    if not isinstance(name, str) or not (index is None or type(index) is int):
        raise UnpicklingError("the place of a tensor is that of no name")
    return MetadataIndex(name, None if offset is None else _size(offset), index)


def _place(part: Any) -> _StorageInfo:
    fields = _fields(part, _PLACE)
    name, offset, length = (cast(Any, fields.get(field)) for field in ("relative_path", "offset", "length"))
    if not is_plain_name(name):
        raise UnpicklingError(f"it names the file {name!r}; only files of the same folder are read")
    if not all(type(n) is int and 0 <= n < 2**62 for n in (offset, length)):
        raise UnpicklingError(f"a place in {name} is none")
    if fields.get("transform_descriptors"):
        raise UnpicklingError(f"{name} is compressed; this program does not write that")
    return _StorageInfo(name, offset, length)


def _check_places(checkpoint: Path, metadata: Metadata) -> None:
    """Every place is in its file, and no two share bytes."""
    ranges: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for place in metadata.storage_data.values():
        ranges[place.relative_path].append((place.offset, place.length))
    for name, parts in ranges.items():
        size = plain_size(checkpoint / name)
        end = 0
        for offset, length in sorted(parts):
            if offset < end or offset + length > size:
                raise UnpicklingError(f"{name} has {size:,} bytes, and no tensor can be at byte {offset:,}")
            end = offset + length
    for index, place, needed in _needs(metadata):
        if needed > place.length:
            raise UnpicklingError(
                f"{index.fqn} has {needed:,} bytes, but {place.length:,} of {place.relative_path}"
            )


def _needs(metadata: Metadata) -> Iterator[tuple[MetadataIndex, _StorageInfo, int]]:
    """Every tensor's chunk with its place and the bytes of its numbers."""
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            for chunk in entry.chunks:
                index = MetadataIndex(key, chunk.offsets)
                if (place := metadata.storage_data.get(index)) is not None:
                    yield index, place, math.prod(chunk.sizes) * entry.properties.dtype.itemsize
